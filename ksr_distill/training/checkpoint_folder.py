"""A run's folder of checkpoints: which are there, which is good, which is best, which may go."""

import logging
import math
import re
from pathlib import Path

from ksr_distill.locks import FileLock
from ksr_distill.training.checkpoint_io import (
    MANIFEST,
    TEMPORARY,
    read_manifest,
    verify_checkpoint,
)

log = logging.getLogger(__name__)

NAME = re.compile(r"update-\d{9,}\.ckpt")


def path_of_update(folder: Path, update: int) -> Path:
    """Return the file that holds a run after so many updates."""
    return folder / f"update-{update:09d}.ckpt"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; they may be links to another disk."""
    return sorted(path for path in folder.glob("update-*.ckpt") if NAME.fullmatch(path.name))


def update_of_file(path: Path) -> int:
    """Return after which update a checkpoint was written."""
    return int(path.stem.removeprefix("update-"))


def last_good_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint whose bytes are those that were written; None in a new folder.

    Raises:
        ValueError: When there are checkpoints and none is good, or there was one and it is gone:
            the user decides to start at zero.
    """
    files = checkpoint_files(Path(folder))
    for path in reversed(files):
        try:
            verify_checkpoint(path)
        except (ValueError, OSError) as error:
            log.warning("%s; trying the one before it", error)
        else:
            return path
    if files:
        raise ValueError(
            f"{folder}: none of the {len(files)} checkpoints is good (newest: {files[-1].name}); "
            "restore one from a backup, or use another name= to start anew"
        )
    link = Path(folder) / "last.ckpt"
    if link.is_symlink():
        raise ValueError(
            f"{link} points to {link.readlink()}, which is gone, and no other checkpoint is there; "
            "restore it with its .json, or delete the link to start at zero"
        )
    return None


def lock_folder(folder: Path) -> FileLock:
    """Return a lock on a run's folder; the kernel lets go of it when the process dies.

    Raises:
        ValueError: When another process of this or another host holds it, or nothing can be written
            there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
    except OSError as error:
        raise ValueError(
            f"{folder}: checkpoints cannot be written here ({error.strerror}); make it a folder "
            "that may be written, or give another run_dir= or name="
        ) from error
    try:
        is_taken = lock.take_alone()
    except OSError as error:
        log.warning(
            "%s: this file system has no locks (%s): take care that no second run writes here",
            folder,
            error.strerror,
        )
        return lock
    if not is_taken:
        lock.release()
        raise ValueError(
            f"{folder}: another run is writing its checkpoints here; wait for it, end it, or use "
            "another name="
        )
    return lock


def best_checkpoints(files: list[Path], monitor: str | None, mode: str) -> list[Path]:
    """Return those with a figure, best first; of equal ones the newer."""
    figures: dict[Path, float] = {}
    for path in files:
        try:
            figure = read_manifest(path).get("metrics", {}).get(monitor, math.nan)
        except ValueError as error:
            log.warning("%s", error)
            continue
        if not math.isnan(figure):
            figures[path] = figure if mode == "max" else -figure
    return sorted(figures, key=lambda path: (figures[path], path), reverse=True)


def point_to(link: Path, target: Path) -> None:
    """Let a link point to a file beside it, without a moment in which there is none."""
    temporary = link.with_name(link.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)


def sweep_orphans(folder: Path, update: int) -> None:
    """Remove what a killed save left; set aside checkpoints from beyond the resumed update."""
    for path in folder.glob(f"*{TEMPORARY}"):
        if path.is_file() or path.is_symlink():
            path.unlink()
    for path in checkpoint_files(folder):
        if update_of_file(path) > update:
            log.warning("%s is newer than the resumed update %d: set aside", path.name, update)
            path.replace(path.with_name(path.name + ".aside"))
    for manifest in folder.glob(f"update-*{MANIFEST}"):
        if not manifest.with_name(manifest.name.removesuffix(MANIFEST)).exists():
            manifest.unlink()
