"""Guards that warn or stop when a run goes wrong: non-finite gradients, a collapsed game."""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ksr_distill.training.checkpoint_folder import checkpoint_files
from ksr_distill.training.checkpoints import RunCheckpoint, callbacks_of, completed_updates
from ksr_distill.training.settings import require
from ksr_distill.training.strategy import HostAgreement

log = logging.getLogger(__name__)


def last_checkpoint_of(trainer: pl.Trainer) -> str:
    """Return the newest checkpoint's path, for a message."""
    for callback in callbacks_of(trainer, RunCheckpoint):
        if files := checkpoint_files(callback.folder):
            return str(files[-1])
    return "none, nothing was saved yet"


class NonFiniteGuard(Callback):
    """Stops a run after too many skipped updates in a row.

    The module skips an update whose gradient is not finite and counts it in ``skipped_in_a_row``,
    both on the device. Reading the count synchronises, so it is read rarely.
    """

    def __init__(self, *, stop_after: int, every_updates: int) -> None:
        """Make the guard.

        Args:
            stop_after: Skipped updates in a row of one network that end the run.
            every_updates: How often to read the count.
        """
        self.stop_after = stop_after
        self.every_updates = every_updates

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Read the count; all ranks have the same one, since they step together."""
        update = completed_updates(trainer)
        if update % self.every_updates:
            return
        module: Any = pl_module
        counts = module.skipped_in_a_row.tolist()
        for name, count in zip(module.trainable_networks(), counts, strict=True):
            if count >= self.stop_after:
                raise ValueError(
                    f"{name}: its last {count} gradients were not finite and were skipped (update "
                    f"{update}; callbacks.non_finite.stop_after={self.stop_after}). Last "
                    f"checkpoint: {last_checkpoint_of(trainer)}. Lower optim.{name}.learning_rate "
                    "or clip_norm, use trainer.precision=32-true, or look at the pictures"
                )


def is_range(ends: Any) -> bool:
    """Return whether these are two numbers, the lower one first."""
    is_pair = isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2
    return is_pair and all(type(end) in (int, float) for end in ends) and ends[0] <= ends[1]


class CollapseMonitor(Callback):
    """Warns when a logged metric stays outside its range; can stop the run."""

    def __init__(
        self,
        *,
        ranges: Mapping[str, Sequence[float]],
        advice: Mapping[str, str],
        every_updates: int,
        warn_after: int,
        stop_after: int | None,
    ) -> None:
        """Make the monitor.

        Args:
            ranges: Lowest and highest healthy value by metric; ``*`` stands for anything.
            advice: What to do, by the same patterns; a range may have none.
            every_updates: How often to look: as often as the metrics are logged.
            warn_after: Warn after this many values in a row outside the range.
            stop_after: Stop after this many; None: only warn.

        Raises:
            ValueError: If a range is none; names its key.
        """
        for name, ends in ranges.items():
            require(is_range(ends), f"callbacks.collapse.ranges.{name}", ends, "[lowest, highest]")
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        self.advice = advice
        self.every_updates = every_updates
        self.warn_after = warn_after
        self.stop_after = stop_after
        self._outside: dict[str, int] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the ranks' agreement: only the first logs, but all have to stop."""
        self._agreement = HostAgreement(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Look at what was logged at this update, if anything was."""
        if completed_updates(trainer) % self.every_updates:
            return
        worst = ""
        logged: dict[str, float] = cast(Any, pl_module).logged
        for name, value in logged.items():
            worst = self.look(name, value) or worst
        [must_stop] = self._agreement.largest(int(bool(worst)))
        if must_stop:
            raise ValueError(
                f"{worst or 'the first rank saw a collapse'}; stopped by callbacks.collapse."
                f"stop_after={self.stop_after}. Last checkpoint: {last_checkpoint_of(trainer)}"
            )

    def look(self, name: str, value: float) -> str:
        """Count a value and warn if it is time to. Returns why to stop, or an empty string."""
        for pattern, (low, high) in self.ranges.items():
            if not fnmatch(name, pattern):
                continue
            looks = self._outside.get(name, 0) + 1 if not low <= value <= high else 0
            self._outside[name] = looks
            told = (
                f"{name}={value:.4g} has been outside [{low:g}, {high:g}] for {looks} looks in a "
                f"row: {self.advice.get(pattern, 'look at previews/ and metrics.csv')}"
            )
            if looks == self.warn_after:
                log.warning("%s", told)
            if self.stop_after is not None and looks >= self.stop_after:
                return told
        return ""
