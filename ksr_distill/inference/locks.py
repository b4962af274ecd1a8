"""Who may work on a target: one process alone, or several that share a job."""

import errno
import fcntl
import os
import socket
from pathlib import Path

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""NFS without a lock daemon, Lustre mounted without -o flock."""


class FileLock:
    """A lock on a file that says who holds it; the kernel lets go of it when the process dies.

    Where the file system has no locks it is always free: two jobs on one target are then not
    noticed.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # NFS locks only what may be written.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take_alone(self) -> bool:
        """Take it for this process only, if no other one holds it."""
        return self._take(fcntl.LOCK_EX)

    def take_shared(self) -> bool:
        """Take it with others that share it, or let others share it, if none holds it alone."""
        return self._take(fcntl.LOCK_SH)

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
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
        return True
