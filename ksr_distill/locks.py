"""Who may work on something on disk: one process alone, or several that share it."""

import fcntl
import os
import socket
from pathlib import Path


class FileLock:
    """A lock on a file that can say who holds it; the kernel lets go of it when the process dies.

    Where the file system has no locks (NFS without a lock daemon, Lustre mounted without -o flock),
    taking it raises the OSError that says so: what is then safe, only its user knows.

    Args:
        path: The file; made if it is not there.
        flags: How it is opened. NFS locks only what may be written, which a folder may not be: for
            one, os.O_RDONLY.

    Raises:
        OSError: When it cannot be opened.
    """

    def __init__(self, path: Path, *, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.path = path
        self._file = os.open(path, flags, 0o666)

    def take_alone(self) -> bool:
        """Take it for this process only, if no other one holds it."""
        return self._take(fcntl.LOCK_EX)

    def take_shared(self) -> bool:
        """Take it with others that share it, or let others share it, if none holds it alone."""
        return self._take(fcntl.LOCK_SH)

    def wait_alone(self) -> None:
        """Take it for this process only, as soon as no other one holds it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def is_in_place(self) -> bool:
        """Tell whether the file is still there; whoever finishes removes it with its folder."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def sign(self) -> None:
        """Write into it who holds it."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def holder(self) -> str:
        """Return who signed it last, as "pid 123 on host"."""
        return os.pread(self._file, 1000, 0).decode(errors="replace") or "unknown"

    def release(self) -> None:
        """Let go of it; the file stays."""
        os.close(self._file)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
