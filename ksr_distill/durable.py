"""Files and folders that are there whole or not at all, whatever dies in the middle."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path that becomes the target when the block ends without an error.

    A file or a folder may be made there. It lies on the target's disk and is flushed before its
    name changes: a crash leaves what was there before, or nothing. A file is replaced in one step;
    a folder cannot be, so that it is away for a moment.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = scratch / "new" / target.name
        new.parent.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            flush_to_disk(path)
        if target.is_dir():
            target.replace(scratch / "old")
        new.replace(target)
        flush_to_disk(target.parent)
    finally:
        shutil.rmtree(scratch)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
