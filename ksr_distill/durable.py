"""Files and folders that are there whole or not at all, whatever dies in the middle."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ksr_distill.locks import FileLock


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path that becomes the target when the block ends without an error.

    A file or a folder may be made there. It lies on the target's disk and is flushed before its
    name changes: a crash leaves what was there before, or nothing. A file is replaced in one step;
    a folder cannot be, so that it is away for a moment. What a killed process left beside the
    target goes when the next one has replaced it.
    """
    scratch, lock = _make_scratch(target)
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
        _remove_orphans(target)
    finally:
        shutil.rmtree(scratch)
        lock.release()


def _make_scratch(target: Path) -> tuple[Path, FileLock]:
    """Return a new folder beside the target, and the lock that says that its process lives."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            lock = FileLock(scratch, flags=os.O_RDONLY)
        except FileNotFoundError:  # taken for an orphan before it was locked
            continue
        with suppress(OSError):  # no locks on this file system: nobody will take it for an orphan
            lock.wait_alone()
        if scratch.exists():
            return scratch, lock
        lock.release()


def _remove_orphans(target: Path) -> None:
    """Remove scratch folders of this target whose processes died."""
    name = re.compile(re.escape(f".{target.name}.new-") + "[a-z0-9_]{8}")
    for scratch in target.parent.iterdir():
        if not name.fullmatch(scratch.name):
            continue
        with suppress(OSError):  # its process has just removed it, or there are no locks
            lock = FileLock(scratch, flags=os.O_RDONLY | os.O_DIRECTORY)
            try:
                if lock.take_alone():
                    shutil.rmtree(scratch)
            finally:
                lock.release()


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
