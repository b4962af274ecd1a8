"""Atomic writes: after a crash a file or folder is the old one or the new one, never a part."""

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

    A file or a folder may be made there. It is on the target's file system and flushed before it
    is renamed. A file is replaced atomically; a folder is missing between two renames, and after
    a crash there. What a killed process left beside the target is removed when the next one has
    replaced it.
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
    """Return a new folder beside the target, and the lock on it that marks its process as alive."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            lock = FileLock(scratch, flags=os.O_RDONLY)
        except FileNotFoundError:  # removed as an orphan before it was locked
            continue
        with suppress(OSError):  # no locks on this file system, so it is never removed as an orphan
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
    """Write a small file atomically: a reader finds the old content or the new one.

    For one writer at a time, since the new content is first written to ``NAME.tmp``.
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
