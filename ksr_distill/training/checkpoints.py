"""The callback that saves a run: when, and which checkpoints are kept."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ksr_distill.locks import FileLock
from ksr_distill.training.checkpoint_folder import (
    best_checkpoints,
    checkpoint_files,
    last_good_checkpoint,
    lock_folder,
    path_of_update,
    point_to,
    sweep_orphans,
)
from ksr_distill.training.checkpoint_io import (
    AtomicCheckpointIO,
    read_manifest,
    write_manifest,
)
from ksr_distill.training.strategy import HostAgreement

log = logging.getLogger(__name__)

__all__ = ["RunCheckpoint", "callbacks_of", "completed_updates", "last_good_checkpoint"]

C = TypeVar("C", bound=pl.Callback)

OPTIMIZER_NAMES = "optimizer_parameter_names"


def _flat(names: list[list[list[str]]]) -> list[str]:
    return [name for optimizer in names for group in optimizer for name in group]


def parameter_names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """Return the names of an optimiser's parameters, group by group, in its order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def note_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Add metrics to a checkpoint's manifest; training goes on if that fails."""
    if not path.exists():  # its write has failed, which was logged
        return
    try:
        write_manifest(path, {**read_manifest(path), "metrics": metrics})
    except (OSError, ValueError) as error:
        log.warning("%s: %s were not noted (%s); training goes on", path.name, metrics, error)


def lay_out_as_parameters(optimizers: Iterable[Optimizer]) -> None:
    """Give an optimiser's moments the memory format of their parameters.

    Loading leaves them in the file's format, and the fused AdamW pairs elements by their place in
    memory: a run continued with another ``channels_last`` or strategy would silently use the
    moments of other weights.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
                if same_shape and value.stride() != parameter.stride():
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class RunCheckpoint(Checkpoint):
    """Saves a run so that the same command continues it, bit for bit.

    Saves at the end of an update only (between the two turns a run cannot be continued), every
    so many updates and every so many minutes by its own clock: Lightning's never fires under manual
    optimisation.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_updates: int,
        every_minutes: float | int,
        keep_last: int,
        keep_best: int,
        monitor: str | None,
        mode: Literal["min", "max"],
        background_above_mb: float | int,
    ) -> None:
        """Make the callback.

        Args:
            folder: Where checkpoints go; ``last.ckpt`` and ``best.ckpt`` there are links.
            every_updates: Save after each multiple of this.
            every_minutes: Save when this much time has passed since the last save.
            keep_last: How many of the newest stay; with 2 a damaged newest one costs little.
            keep_best: How many of the best by ``monitor`` stay besides; a validation that is among
                them is saved whatever the interval.
            monitor: A metric that validation logs, e.g. ``val/psnr_y``.
            mode: Whether larger or smaller is better.
            background_above_mb: Checkpoints larger than this are written by a thread.
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
        self._lock: FileLock | None = None
        self._is_untidy = False
        self.seconds_saving = 0.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace Lightning's checkpoint IO by ours, and lock the folder."""
        trainer.strategy.checkpoint_io = self.io
        if stage == "fit" and trainer.is_global_zero:
            self._lock = lock_folder(self.folder)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the names of the optimisers' parameters until there are optimisers."""
        self._saved_names = checkpoint[OPTIMIZER_NAMES]
        reopen_if_longer(checkpoint["loops"]["fit_loop"], getattr(pl_module, "num_updates", 0))

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the names of the optimisers' parameters, whose states are ordered by position."""
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
        """Check that all ranks are at the same update; remove what a killed save left behind."""
        lay_out_as_parameters(trainer.optimizers)
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
            self._say_if_nothing_is_best(trainer)
        if trainer.strategy.broadcast(trainer.is_global_zero and self._lacks_figures(trainer)):
            validate_now(trainer)

    def _lacks_figures(self, trainer: pl.Trainer) -> bool:
        """Return whether the run was killed between a save and the end of its validation."""
        update, every = completed_updates(trainer), trainer.val_check_batch
        is_due = update and sum(trainer.num_val_batches) and every and update % every == 0
        return bool(is_due) and not read_manifest(path_of_update(self.folder, update))["metrics"]

    def _say_if_nothing_is_best(self, trainer: pl.Trainer) -> None:
        if self.monitor is not None and self.keep_best and trainer.limit_val_batches == 0:
            log.warning(
                "data.val_shards is not given: nothing is validated, and %s/best.ckpt will not be "
                "written; export last.ckpt, or give shards of held-out pictures",
                self.folder,
            )

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
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the figures beside the saved weights; save them if they are among the best."""
        if trainer.sanity_checking:
            return
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        chooses = self.monitor is not None and self.keep_best > 0
        if chooses and self.monitor not in figures:
            raise ValueError(
                f"callbacks.checkpoint.monitor={self.monitor!r} is not among what validation logs "
                f"({', '.join(sorted(figures))}); use one of these, or null"
            )
        if completed_updates(trainer) == self._last_saved_update:
            self._annotate(trainer, figures)
        elif chooses and trainer.strategy.broadcast(self._would_be_kept(figures)):
            self._save(trainer, metrics=figures)

    def _would_be_kept(self, figures: dict[str, float]) -> bool:
        figure = figures[str(self.monitor)]
        best = best_checkpoints(checkpoint_files(self.folder), self.monitor, self.mode)
        if math.isnan(figure) or len(best) < self.keep_best:
            return not math.isnan(figure)
        worst_kept = read_manifest(best[self.keep_best - 1])["metrics"][self.monitor]
        return figure >= worst_kept if self.mode == "max" else figure <= worst_kept

    def _annotate(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """Note the metrics once the file is there, without waiting for a write in progress."""
        path = path_of_update(self.folder, self._last_saved_update)
        if trainer.is_global_zero:
            self.io.when_written(lambda: note_metrics(path, metrics))
        self._is_untidy = True
        if not self.io.is_writing:
            self._tidy(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run, whatever the interval, and wait until it is on the disk."""
        self.save_and_wait(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this update, if it is not yet. Every rank has to call it, at the end of a batch."""
        self._last_save_time = time.monotonic()
        if completed_updates(trainer) != self._last_saved_update:
            self._save(trainer, metrics={})

    def _save(self, trainer: pl.Trainer, *, metrics: dict[str, float]) -> None:
        began = time.monotonic()
        update = completed_updates(trainer)
        facts = {"update": update, "num_processes": trainer.world_size, "metrics": metrics}
        trainer.save_checkpoint(
            path_of_update(self.folder, update), weights_only=False, storage_options=facts
        )
        self._last_saved_update = update
        self._is_untidy = True
        if not self.io.is_writing:
            self._tidy(trainer)
        self.seconds_saving += time.monotonic() - began

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
        return path_of_update(self.folder, self._last_saved_update)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._unlock()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Finish what is being written, and let go of the folder. A broken update is not saved."""
        try:
            self.io.wait()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _tidy(self, trainer: pl.Trainer) -> None:
        self._is_untidy = False
        if not trainer.is_global_zero:
            return
        for chore in self._chores():
            try:
                chore()
            except OSError as error:
                log.warning(
                    "%s: links and old checkpoints could not be tidied (%s); training goes on: "
                    "look at what stands in the way",
                    self.folder,
                    error,
                )

    def _chores(self) -> Iterator[Callable[[], None]]:
        files = checkpoint_files(self.folder)
        best = best_checkpoints(files, self.monitor, self.mode)
        if files:
            yield partial(point_to, self.folder / "last.ckpt", files[-1])
        if best:
            yield partial(point_to, self.folder / "best.ckpt", best[0])
        for path in set(files) - set(files[-self.keep_last :]) - set(best[: self.keep_best]):
            yield partial(self.io.remove_checkpoint, path)


def callbacks_of(trainer: pl.Trainer, kind: type[C]) -> list[C]:
    """Return a run's callbacks of a kind."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, kind)]


def reopen_if_longer(loop: dict[str, Any], num_updates: int) -> None:
    """Mark a finished run as unfinished if it has more updates to make now.

    To Lightning a run is one epoch: without this, a finished run that is given a larger
    ``num_updates`` would do nothing.
    """
    batches = loop["epoch_loop.batch_progress"]
    if batches["is_last_batch"] and batches["total"]["completed"] < num_updates:
        batches["is_last_batch"] = False
        for count in ("total", "current"):
            loop["epoch_progress"][count] |= {"processed": 0, "completed": 0}


def validate_now(trainer: pl.Trainer) -> None:
    """Validate before the first update, as Lightning does between two; it passes over this one."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.restarting = False
    loop.run()
    trainer.training = True


def completed_updates(trainer: pl.Trainer) -> int:
    """Return how many updates are completed, at the end of a batch or between batches."""
    return trainer.fit_loop.total_batch_idx + 1
