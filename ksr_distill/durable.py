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


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file whole, whatever dies: a reader finds the old content or the new one.

    One writer at a time: the new content lies in ``NAME.tmp`` beside the file until it is whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
