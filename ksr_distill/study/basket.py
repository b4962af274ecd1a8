"""The basket of prompts: a CSV file with the columns id, prompt, category."""

import csv
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("id", "prompt", "category")

# An id is also a file's stem and a cell of votes.csv: no separators, no leading dot, no formulas.
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Prompt(NamedTuple):
    """One row of the basket."""

    id: str
    text: str
    category: str


def read_basket(path: Path) -> list[Prompt]:
    """Return the prompts in the file's order.

    Raises:
        ValueError: A column or a cell is missing, an id cannot name a file, or occurs twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames)
            prompts = [_read_row(path, reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from error
    if not prompts:
        raise ValueError(f"{path}: no prompts below the header; give at least one row")
    _check_unique(path, prompts)
    return prompts


def _check_columns(path: Path, names: object) -> None:
    given = list(names) if isinstance(names, list | tuple) else []
    missing = [column for column in COLUMNS if column not in given]
    if missing:
        raise ValueError(
            f"{path}: columns {given} lack {missing}; the first line must name id,prompt,category"
        )


def _read_row(path: Path, line: int, row: dict[str, str | None]) -> Prompt:
    cells = {column: (row[column] or "").strip() for column in COLUMNS}
    for column, cell in cells.items():
        if not cell:
            raise ValueError(f"{path}: line {line}: {column} is empty; every row needs all three")
    if not ID_PATTERN.fullmatch(cells["id"]):
        raise ValueError(
            f"{path}: line {line}: id {cells['id']!r} cannot name a picture; use up to 100 "
            "letters, digits, dots, dashes or underscores, beginning with a letter or digit"
        )
    return Prompt(cells["id"], cells["prompt"], cells["category"])


def _check_unique(path: Path, prompts: list[Prompt]) -> None:
    # Lower case: two ids that differ only in it are one file on Windows and macOS.
    counts = Counter(prompt.id.lower() for prompt in prompts)
    twice = [prompt_id for prompt_id, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"{path}: {len(twice)} ids occur more than once (case ignored): "
            f"{', '.join(twice[:5])}; give each row an id of its own"
        )
