"""Finished tiles on disk: memory does not grow with the picture, and a killed job goes on."""

import errno
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ksr_distill.inference.tiling.passes import TilePass
from ksr_distill.inference.tiling.tile_file import CHANNELS, TileFile
from ksr_distill.inference.tiling.tiles import TilePlan
from ksr_distill.locks import FileLock

logger = logging.getLogger(__name__)

LOCK, MANIFEST, FINISHED, CAME = "job.lock", "job.json", "finished", ".came"

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""NFS without a lock daemon, Lustre mounted without -o flock."""

JOIN_SECONDS = 2.0
"""How long one waits for another that prepares the folder, which takes milliseconds."""

MEET_SECONDS = 600.0
"""How long processes wait for each other before a picture that is there already is made anew."""

MEET_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Workspace:
    """A hidden folder beside the target, with a raw file for each pass.

    Attributes:
        worker: This process's number among those that share the job.
    """

    folder: Path
    worker: int = 0

    @classmethod
    @contextmanager
    def open(
        cls, target: Path, job: dict[str, object], *, worker: int = 0, num_workers: int = 1
    ) -> Iterator["Workspace"]:
        """Yield the target's workspace: with its tiles if the job is the same, empty if not.

        Meanwhile no other job can open it; where it is shared, other processes of this one can.
        The last process of a finished job removes it. Where the target is there already, nobody can
        tell a process that comes late to a finished job from the first of a new one: it waits until
        all of them have come.

        Args:
            job: Everything that decides a pixel.

        Raises:
            ValueError: If another process makes this target; if processes that share the job
                find another's tiles (which of them should remove these, and when, cannot be known
                here), or do not all come to make anew what is there.
        """
        folder = workspace_folder(target)
        wanted = json.dumps(job, indent=1, sort_keys=True).encode()
        lock = None
        while lock is None:
            lock = _enter(target, folder, wanted, worker=worker, is_shared=num_workers > 1)
        try:
            if num_workers > 1:
                _meet(target, folder, worker, num_workers)
            yield cls(folder, worker)
        finally:
            _leave(folder, lock)

    def open_store(self, tile_pass: TilePass, plan: TilePlan) -> TileFile:
        """Return a pass's tiles; those of another tiling have another name."""
        rows, columns = plan.rows, plan.columns
        tiling = f"{rows.tile}x{columns.tile}-{rows.overlap}"
        path = self.folder / f"pass{tile_pass.stage}-{tiling}.tiles"
        return TileFile(path, plan, tile_pass.dtype, worker=self.worker)

    def finish(self) -> None:
        """Say that the picture is written, so that the last process removes the tiles."""
        (self.folder / FINISHED).touch()


def _enter(
    target: Path, folder: Path, wanted: bytes, *, worker: int, is_shared: bool
) -> FileLock | None:
    """Return the lock on a folder that holds this job; None if it was removed meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if folder.is_file():
            raise
        return None
    try:
        lock = FileLock(folder / LOCK)
    except FileNotFoundError:
        return None
    try:
        is_alone = _take(lock.take_alone)
        if is_alone and lock.is_in_place():
            _prepare(folder, wanted, worker=worker, is_shared=is_shared)
        is_taken = _join(lock) if is_shared else is_alone
        if lock.is_in_place():
            if is_taken and _whose(folder) == wanted:
                lock.sign()
                return lock
            raise ValueError(
                f"{target} is being made by another process ({lock.holder()}); "
                "wait for it, or use another -o"
            )
    except BaseException:
        _leave(folder, lock)  # the last process of the other job may have gone meanwhile
        raise
    lock.release()
    return None


def _prepare(folder: Path, wanted: bytes, *, worker: int, is_shared: bool) -> None:
    """Make a folder that nobody else uses this job's."""
    is_finished = (folder / FINISHED).exists()
    if not _has_tiles(folder):  # whoever waited here was killed before all had come
        for mark in folder.glob(f"*{CAME}"):
            mark.unlink(missing_ok=True)
    if _whose(folder) not in (None, wanted):
        stranger = f"{folder} is from another job (other settings, picture or model)"
        if is_shared and not is_finished:
            raise ValueError(f"{stranger}; remove it and start all processes again")
        if not is_finished:
            logger.warning("%s: begun anew", stranger)
        _clear(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    temporary = folder / f"job.{worker}.tmp"
    temporary.write_bytes(wanted)
    temporary.replace(folder / MANIFEST)


def _whose(folder: Path) -> bytes | None:
    """Return the manifest of a folder's job, as it is: damaged, it is that of no job."""
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None


def _take(take: Callable[[], bool]) -> bool:
    """Take a lock; where the file system has none, two jobs on one target are not noticed."""
    try:
        return take()
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        return True


def _join(lock: FileLock) -> bool:
    """Share a lock; one that prepares the folder holds it alone for a moment."""
    until = time.monotonic() + JOIN_SECONDS
    while not _take(lock.take_shared):
        if time.monotonic() > until:
            return False
        time.sleep(JOIN_SECONDS / 20)
    return True


def _meet(target: Path, folder: Path, worker: int, num_workers: int) -> None:
    """Say that a process has come; where the target is there already, wait for all the others."""
    marks = [folder / f"{number}{CAME}" for number in range(num_workers)]
    mine = folder / f"{worker}{CAME}"
    mine.touch()
    try:
        if target.exists() and not all(mark.exists() for mark in marks):
            logger.warning(
                "%s is there already: waiting for all %d processes to make it anew",
                target,
                num_workers,
            )
            _wait_for_all(target, marks, mine=mine)
    except BaseException:
        mine.unlink(missing_ok=True)
        raise


def _wait_for_all(target: Path, marks: list[Path], *, mine: Path) -> None:
    until = time.monotonic() + MEET_SECONDS
    while target.exists() and (num_missing := sum(not mark.exists() for mark in marks)):
        if time.monotonic() > until:
            raise ValueError(
                f"{target} is there already, and only {len(marks) - num_missing} of {len(marks)} "
                f"processes came within {MEET_SECONDS / 60:g} minutes to make it anew; leave it if "
                "it is finished, else start all of them again, or remove it first"
            )
        time.sleep(MEET_POLL_SECONDS)
        mine.touch()  # without locks, one that comes takes itself for the first, and clears up


def _has_tiles(folder: Path) -> bool:
    try:
        return any(path.suffix == ".tiles" for path in folder.iterdir())
    except FileNotFoundError:  # another process has just removed it
        return False


def _leave(folder: Path, lock: FileLock) -> None:
    """Let go of a folder; remove it if nobody else is there and it is of no more use."""
    is_useless = (folder / FINISHED).exists() or not _has_tiles(folder)
    is_last = is_useless and _take(lock.take_alone) and lock.is_in_place()
    if is_last:
        _clear(folder)
        lock.path.unlink(missing_ok=True)
    lock.release()
    if is_last:
        with suppress(OSError):  # another process is making it its own
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Delete all but the lock; the manifest last, so that no tile is ever without one."""
    paths = [path for path in folder.iterdir() if path.name != LOCK]
    for path in sorted(paths, key=lambda path: path.name == MANIFEST):
        path.unlink(missing_ok=True)


def workspace_folder(target: Path) -> Path:
    """Return where the tiles of a target lie while it is made."""
    return target.with_name(f".{target.name}.ksr-work")


def begun_job(target: Path) -> Mapping[str, object]:
    """Return what decides the pixels of the tiles that a target has already; nothing without."""
    try:
        job = json.loads((workspace_folder(target) / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return job if isinstance(job, dict) else {}


def used_bytes(target: Path) -> int:
    """Return what a target's tiles take on disk already."""
    used = 0
    for path in workspace_folder(target).glob("*.tiles"):
        with suppress(FileNotFoundError):  # another process has just finished
            used += path.stat().st_blocks * 512
    return used


def tile_bytes(plan: TilePlan, dtype: torch.dtype) -> int:
    """Return how much disk the tiles of a plan take."""
    return len(plan) * plan.rows.tile * plan.columns.tile * CHANNELS * dtype.itemsize


def file_fingerprint(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(modules: list[nn.Module]) -> str:
    """Return a digest of names, shapes, dtypes and of up to 64 values of every parameter.

    A whole digest of 8 GB would take longer than many a picture; another training changes all.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.state_dict().items():
            every = max(1, math.ceil(parameter.numel() / 64))
            values = parameter.flatten()[::every].double().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()
