"""The JSON files of a model folder; what is none is told by its file, in one line."""

import json
from pathlib import Path
from typing import Any

REMEDY = "copy the model folder again, or make it anew"


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: If the file is damaged, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {REMEDY}") from error
    return as_object(value, where=file)


def as_object(value: object, *, where: Path | str) -> dict[str, Any]:
    """Return what was read, if it is an object.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {value!r:.40}, not an object; {REMEDY}")
    return value
