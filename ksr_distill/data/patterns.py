"""Which shards a pattern names."""

import re
from collections.abc import Sequence
from glob import glob, has_magic
from os.path import expanduser
from pathlib import Path

from braceexpand import braceexpand

REMEDY = "pack photos with `ksr shards pack FOLDER OUT`; it prints the pattern to give here"


def expand_shards(pattern: str | Sequence[str], *, key: str) -> tuple[Path, ...]:
    """Return the shards that a pattern names, in the pattern's order.

    Args:
        pattern: A path, with braces (``train-{000000..000127}.tar``) or glob signs
            (``train-*.tar``, sorted), or a list of such.
        key: The setting it came from, for the message.

    Raises:
        ValueError: If a part matches nothing, names a missing file, or names a shard twice.
    """
    shards: list[Path] = []
    for part in [pattern] if isinstance(pattern, str) else list(pattern):
        refuse_pipe(part, key=key)
        shards.extend(_expand_part(part, key=key))
    if not shards:
        raise ValueError(f"{key}={pattern!r} names no shards; {REMEDY}")
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise ValueError(f"{key}={pattern!r} names {twice} twice; name each shard once")
    return tuple(shards)


def refuse_pipe(url: str, *, key: str) -> None:
    """Raise for a ``pipe:`` URL, which webdataset would hand to a shell.

    Raises:
        ValueError: Always with the remedy, for such a URL.
    """
    if re.match(r"\s*pipe:", url, flags=re.IGNORECASE):
        raise ValueError(
            f"{key}={url!r}: a pipe: URL runs a shell command and is refused; "
            "give a file path or an http(s) URL"
        )


def _expand_part(part: str, *, key: str) -> list[Path]:
    if "://" in part:
        raise ValueError(
            f"{key}={part!r} is a URL, but indexed shards are local files; "
            "copy them to this machine, or use data=stream"
        )
    found: list[Path] = []
    for path in map(expanduser, braceexpand(part)):  # quoted twice, for Hydra, the shell does not
        # Path.glob would need the pattern cut into a folder and a rest.
        matches = sorted(glob(path)) if has_magic(path) else [path] * Path(path).is_file()  # noqa: PTH207
        if not matches:
            raise ValueError(f"{key}={part!r} matches nothing: no file {path}; {REMEDY}")
        for match in map(Path, matches):
            if not match.is_file():  # a pipe would be waited for
                raise ValueError(f"{key}={part!r} matches {match}, which is no file; move it away")
            found.append(match)
    return found
