"""Speed of each rank, and the time it spends waiting for its loader or for checkpoints."""

import resource
import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ksr_distill.training.arithmetic import ArithmeticCounter
from ksr_distill.training.checkpoints import RunCheckpoint, callbacks_of, completed_updates

MAX_GATHERED_RANKS = 16
"""With more ranks only the lowest, the mean and the highest value are logged."""


class Throughput(Callback):
    """Logs, every N updates, speed, memory and waiting times.

    ``speed/updates_per_s``, ``speed/images_per_s`` (all ranks), ``speed/tflops`` (a rank),
    ``speed/checkpoint_share``, and for each rank ``rank/R/loader_wait_share`` and
    ``rank/R/memory_gb``. Only then the host synchronises with the device. On a GPU the loader wait
    is the device's idle time: it may still work while the host fetches the next batch.
    """

    def __init__(self, *, every_updates: int, count_flops: bool) -> None:
        """Make the callback.

        Args:
            every_updates: Updates between two rows.
            count_flops: Count the arithmetic of one update, once in a run, after every network has
                had one. That update runs eagerly; it is not counted where its memory would not fit.
        """
        self.every_updates = every_updates
        self.count_flops = count_flops
        self.flops_per_update: int | None = None
        self._counting: ExitStack | None = None
        self._counter: ArithmeticCounter | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the count: a resumed run does not count again."""
        return {"flops_per_update": self.flops_per_update}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count back."""
        self.flops_per_update = state_dict["flops_per_update"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the first window."""
        self._gaps = DeviceGaps() if pl_module.device.type == "cuda" else None
        self._begin_window(trainer)
        self._ready_at = time.monotonic()

    def _begin_window(self, trainer: pl.Trainer) -> None:
        self._window_began = time.monotonic()
        self._window_update = completed_updates(trainer)
        self._images = 0
        self._waited_s = self._validated_s = 0.0
        self._saved_before_s = self._saving_s(trainer)

    def _saving_s(self, trainer: pl.Trainer) -> float:
        return sum(callback.seconds_saving for callback in callbacks_of(trainer, RunCheckpoint))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop the loader's clock; begin to count the arithmetic if this is the update for it."""
        if self._gaps is None:
            self._waited_s += time.monotonic() - self._ready_at
        else:
            self._gaps.end()
        self._images += len(batch[0]) if isinstance(batch, tuple) else 1
        if self.count_flops and self.flops_per_update is None and _is_typical(pl_module):
            self._begin_counting(pl_module)

    def _begin_counting(self, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        ways = ("compile_networks", "cuda_graphs")
        is_eager = not any(getattr(module, way, False) for way in ways)
        if not is_eager and not _eager_update_fits(pl_module.device):
            self.count_flops = False
            return
        self._counter = ArithmeticCounter()
        self._counting = ExitStack()
        if hasattr(module, "eager"):  # kernels of compiled code are invisible to the counter
            self._counting.enter_context(module.eager())
        self._counting.enter_context(self._counter)

    def _end_counting(self) -> None:
        if self._counting is not None and self._counter is not None:
            self._counting.close()
            self.flops_per_update = self._counter.get_total_flops()
            self._counting = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log a row when it is time to, and start the loader's clock."""
        self._end_counting()
        if completed_updates(trainer) % self.every_updates == 0:
            self._report(trainer, pl_module.device)
            self._begin_window(trainer)
        self._ready_at = time.monotonic()
        if self._gaps is not None:
            self._gaps.begin()

    def _report(self, trainer: pl.Trainer, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if self._gaps is not None:
            self._waited_s = self._gaps.seconds()
        saved_s = self._saved_before_s
        seconds = time.monotonic() - self._window_began - self._validated_s
        updates = completed_updates(trainer) - self._window_update
        wait_share = max(0.0, self._waited_s - (self._saving_s(trainer) - saved_s)) / seconds
        row = {
            "speed/updates_per_s": updates / seconds,
            "speed/images_per_s": self._images * trainer.world_size / seconds,
            "speed/checkpoint_share": (self._saving_s(trainer) - saved_s) / seconds,
        }
        if self.flops_per_update is not None:
            row["speed/tflops"] = self.flops_per_update * updates / seconds / 1e12
        ranks = _gather([wait_share, _memory_gb(device)], device)
        row |= _rank_figures("loader_wait_share", [rank[0] for rank in ranks])
        row |= _rank_figures("memory_gb", [rank[1] for rank in ranks])
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(row, step=completed_updates(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the window's clock."""
        self._validation_began = time.monotonic()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks again. A sanity validation comes before there are any."""
        if not trainer.sanity_checking:
            self._validated_s += time.monotonic() - self._validation_began
            self._ready_at = time.monotonic()
            if self._gaps is not None:
                self._gaps.begin()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the counter's mode, whatever happened inside."""
        self._end_counting()


class DeviceGaps:
    """Idle times of the device between the end of an update and the start of the next.

    An event completes when the work before it is done: while the device is busy the gap is 0.
    """

    def __init__(self) -> None:
        self._begun: Any = None
        self._gaps: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """Begin a gap; one that was begun and not ended is forgotten."""
        self._begun = self._now()

    def end(self) -> None:
        """End the gap that was begun, if any."""
        if self._begun is not None:
            self._gaps.append((self._begun, self._now()))
            self._begun = None

    def seconds(self) -> float:
        """Return the sum of all gaps, and forget them. Synchronise with the device before."""
        total = sum(begin.elapsed_time(end) for begin, end in self._gaps) / 1000
        self._gaps.clear()
        return total

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _is_typical(pl_module: pl.LightningModule) -> bool:
    moved: dict[str, int] = getattr(pl_module, "network_updates", {})
    return all(moved.values())


def _eager_update_fits(device: torch.device) -> bool:
    """Return whether an update may need twice the memory of a compiled one (measured: 1.5×)."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    return 2 * torch.cuda.max_memory_allocated(device) < total


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _gather(values: list[float], device: torch.device) -> list[list[float]]:
    if not dist.is_initialized():
        return [values]
    mine = torch.tensor(values, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def _rank_figures(name: str, values: list[float]) -> dict[str, float]:
    if len(values) <= MAX_GATHERED_RANKS:
        return {f"rank/{rank}/{name}": value for rank, value in enumerate(values)}
    mean = sum(values) / len(values)
    return {
        f"rank/min/{name}": min(values),
        f"rank/mean/{name}": mean,
        f"rank/max/{name}": max(values),
    }
