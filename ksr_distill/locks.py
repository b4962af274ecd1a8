"""File locks, exclusive to one process or shared by several."""

import fcntl
import os
import socket
from pathlib import Path


class FileLock:
    """A file lock that can name its holder; the kernel releases it when the process dies.

    On a file system without locks (NFS without a lock daemon, Lustre mounted without -o flock)
    acquiring it raises an OSError, which the caller has to handle.

    Args:
        path: The file; created if missing.
        flags: How it is opened. NFS locks only files that are open for writing; a folder cannot be
            and needs os.O_RDONLY.

    Raises:
        OSError: When it cannot be opened.
    """

    def __init__(self, path: Path, *, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.path = path
        self._file = os.open(path, flags, 0o666)

    def take_alone(self) -> bool:
        """Acquire it exclusively, unless another process holds it; return whether it is held."""
        return self._take(fcntl.LOCK_EX)

    def take_shared(self) -> bool:
        """Acquire it shared, unless a process holds it exclusively; return whether it is held."""
        return self._take(fcntl.LOCK_SH)

    def wait_alone(self) -> None:
        """Acquire it exclusively, waiting until no other process holds it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def is_in_place(self) -> bool:
        """Return whether the path is still this file: a process that finishes may remove it."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def sign(self) -> None:
        """Write this process's id and host into the file."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def holder(self) -> str:
        """Return the last signature, as "pid 123 on host"."""
        return os.pread(self._file, 1000, 0).decode(errors="replace") or "unknown"

    def release(self) -> None:
        """Release it; the file stays."""
        os.close(self._file)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
