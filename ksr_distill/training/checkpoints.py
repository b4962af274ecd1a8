"""When a run is saved, which checkpoints stay, and how the same command finds the last good one."""

import fcntl
import logging
import math
import time
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ksr_distill.training.checkpoint_io import (
    MANIFEST,
    TEMPORARY,
    AtomicCheckpointIO,
    read_manifest,
    verify_checkpoint,
)
from ksr_distill.training.strategy import HostAgreement

log = logging.getLogger(__name__)

OPTIMIZER_NAMES = "optimizer_parameter_names"


def _flat(names: list[list[list[str]]]) -> list[str]:
    return [name for optimizer in names for group in optimizer for name in group]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("update-*.ckpt") if not path.is_symlink())


def update_of_file(path: Path) -> int:
    """Return after which update a checkpoint was written."""
    return int(path.stem.removeprefix("update-"))


def last_good_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint whose bytes are those that were written; None in a new folder.

    Raises:
        ValueError: When there are checkpoints and none is good: the user decides to start at zero.
    """
    files = checkpoint_files(Path(folder))
    for path in reversed(files):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            log.warning("%s; trying the one before it", error)
        else:
            return path
    if files:
        raise ValueError(
            f"{folder}: none of the {len(files)} checkpoints is good (newest: {files[-1].name}); "
            "restore one from a backup, or use another name= to start anew"
        )
    return None


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Return the names of an optimiser's parameters, group by group, in its order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def lock_folder(folder: Path) -> IO[str]:
    """Return an open lock on a run's folder; the kernel lets go of it when the process dies.

    Raises:
        ValueError: When another process of this or another host holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ValueError(
            f"{folder}: another run is writing its checkpoints here; wait for it, end it, or use "
            "another name="
        ) from error
    return lock


class RunCheckpoint(Checkpoint):
    """Saves a run so that the same command continues it, bit for bit.

    Saves at the end of an update only (between the players' turns a run cannot be continued), every
    so many updates and every so many minutes by its own clock: Lightning's never fires under manual
    optimisation.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_updates: int,
        every_minutes: float,
        keep_last: int,
        keep_best: int,
        monitor: str | None,
        mode: Literal["min", "max"],
        background_above_mb: float,
    ) -> None:
        """Make the callback.

        Args:
            folder: Where checkpoints go; ``last.ckpt`` and ``best.ckpt`` there are links.
            every_updates: Save after each multiple of this. Make it a multiple of the interval at
                which ``monitor`` is measured, so that the figure belongs to the saved weights.
            every_minutes: Save when this much time has passed since the last save.
            keep_last: How many of the newest stay; with 2 a damaged newest one costs little.
            keep_best: How many of the best by ``monitor`` stay besides.
            monitor: A logged metric, e.g. ``val/psnr_y``.
            mode: Whether larger or smaller is better.
            background_above_mb: Larger checkpoints are written by a thread.
        """
        if every_updates < 1 or keep_last < 1 or keep_best < 0 or every_minutes <= 0:
            raise ValueError(
                f"callbacks.checkpoint: every_updates={every_updates}, keep_last={keep_last}, "
                f"keep_best={keep_best}, every_minutes={every_minutes}: the first two must be at "
                "least 1, keep_best at least 0, every_minutes above 0"
            )
        self.folder = Path(folder)
        self.every_updates = every_updates
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.monitor = monitor
        self.mode = mode
        self.io = AtomicCheckpointIO(background_above_mb=background_above_mb)
        self._saved_names: list[list[list[str]]] | None = None
        self._last_save_time = time.monotonic()
        self._last_saved_update = 0
        self._lock: IO[str] | None = None
        self._is_untidy = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the reading and writing of checkpoints, before Lightning reads one."""
        trainer.strategy.checkpoint_io = self.io
        self.io.expected_model = pl_module
        if stage == "fit" and trainer.is_global_zero:
            self._lock = lock_folder(self.folder)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the names of the optimisers' parameters until there are optimisers."""
        self._saved_names = checkpoint[OPTIMIZER_NAMES]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the names of the optimisers' parameters: their states go by position alone."""
        names = [parameter_names(optimizer, pl_module) for optimizer in trainer.optimizers]
        checkpoint[OPTIMIZER_NAMES] = names

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimiser states of parameters in another order, before Lightning loads them."""
        if self._saved_names is None:
            return
        here = [parameter_names(optimizer, pl_module) for optimizer in trainer.optimizers]
        if self._saved_names != here:
            pairs = zip_longest(_flat(self._saved_names), _flat(here))
            saved, wanted = next(((a, b) for a, b in pairs if a != b), ("", ""))
            raise ValueError(
                f"the checkpoint's optimizer states are of other parameters or groups ({saved!r} "
                f"where {wanted!r} is wanted): use the configuration it was trained with, or "
                "another name="
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sweep what a killed save left, and check that all ranks stand at the same update."""
        self._agreement = HostAgreement(trainer)
        update = completed_updates(trainer)
        newest, minus_oldest = self._agreement.largest(update, -update)
        if newest != -minus_oldest:
            raise ValueError(
                f"ranks resume from updates {-minus_oldest} to {newest}: they see different files "
                f"in {self.folder}; put it on a file system that all nodes share"
            )
        self._last_saved_update = update
        self._last_save_time = time.monotonic()
        if trainer.is_global_zero:
            sweep_orphans(self.folder, update)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Save when it is time to; all ranks agree on it, since their clocks differ."""
        is_overdue = time.monotonic() - self._last_save_time > 60 * self.every_minutes
        [is_due] = self._agreement.largest(int(is_overdue))
        if is_due or completed_updates(trainer) % self.every_updates == 0:
            self.save(trainer)
        elif self._is_untidy and not self.io.is_writing:
            self._tidy(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, whatever the interval, and wait until it is on the disk."""
        self.save_and_wait(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this update, if it is not yet. Every rank has to call it, at the end of a batch."""
        update = completed_updates(trainer)
        self._last_save_time = time.monotonic()
        if update == self._last_saved_update:
            return
        facts: dict[str, Any] = {"update": update, "num_processes": trainer.world_size}
        if self.monitor is not None and self.monitor in trainer.callback_metrics:
            facts["metrics"] = {self.monitor: float(trainer.callback_metrics[self.monitor])}
        path = self.folder / f"update-{update:09d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False, storage_options=facts)
        self._last_saved_update = update
        self._is_untidy = True
        if not self.io.is_writing:
            self._tidy(trainer)

    def save_and_wait(self, trainer: pl.Trainer) -> Path:
        """Save this update and return its file once it is on the disk. Every rank has to call it.

        Raises:
            OSError: On every rank, when rank 0 could not write it.
        """
        self.save(trainer)
        self.io.wait()
        self._tidy(trainer)
        failure = trainer.strategy.broadcast(self.io.failure)
        if failure is not None:
            good = checkpoint_files(self.folder)
            kept = good[-1].name if good else "none"
            raise OSError(
                f"update {self._last_saved_update} could not be saved ({failure}); the last good "
                f"checkpoint in {self.folder} is {kept}: free space and run the same command again"
            )
        return self.folder / f"update-{self._last_saved_update:09d}.ckpt"

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._unlock()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Finish what is being written, and let go of the folder. A broken update is not saved."""
        self.io.wait()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _tidy(self, trainer: pl.Trainer) -> None:
        self._is_untidy = False
        if not trainer.is_global_zero:
            return
        try:
            self._prune()
        except OSError as error:
            log.warning("%s: old checkpoints could not be pruned (%s)", self.folder, error)

    def _prune(self) -> None:
        files = checkpoint_files(self.folder)
        best = best_checkpoints(files, self.monitor, self.mode)
        if files:
            point_to(self.folder / "last.ckpt", files[-1])
        if best:
            point_to(self.folder / "best.ckpt", best[0])
        for path in set(files) - set(files[-self.keep_last :]) - set(best[: self.keep_best]):
            self.io.remove_checkpoint(path)


def completed_updates(trainer: pl.Trainer) -> int:
    """Return how many updates are behind us, as seen at the end of a batch or between batches."""
    return trainer.fit_loop.total_batch_idx + 1


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
        path.unlink()
    for path in checkpoint_files(folder):
        if update_of_file(path) > update:
            log.warning("%s is newer than the resumed update %d: set aside", path.name, update)
            path.replace(path.with_name(path.name + ".aside"))
    for manifest in folder.glob(f"update-*{MANIFEST}"):
        if not manifest.with_name(manifest.name.removesuffix(MANIFEST)).exists():
            manifest.unlink()
