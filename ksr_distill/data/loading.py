"""Loaders that yield one batch per update, with clear errors when a worker fails."""

import atexit
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ksr_distill.data.reader import HiresSample, PictureDataset

log = logging.getLogger(__name__)


class HiresBatch(NamedTuple):
    """A rank's share of an update's global batch: its micro-batches, one after another.

    Attributes:
        hires_uint8: The crops, 0 to 255.
        positions: Of the samples in the plan's order; -1 in a stream, which has none.
        update: Which update they are for: degradations are drawn from (seed, update, micro-batch).
        replaced: "shard: key: reason" of pictures that could not be used.
    """

    hires_uint8: UInt8[Tensor, "b 3 H W"]
    positions: Int[Tensor, " b"]
    update: int
    replaced: tuple[str, ...]


class ValidationBatch(NamedTuple):
    """Pictures for validation, with their numbers: degradations are drawn from (seed, number)."""

    hires_uint8: UInt8[Tensor, "b 3 H W"]
    pictures: tuple[int, ...]
    replaced: tuple[str, ...]


class CorruptionBudget:
    """Counts the pictures that could not be used, and stops the run beyond a budget.

    Args:
        budget: How many different pictures each process may replace since its start.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.seen: set[str] = set()

    def note(self, replaced: Iterable[str]) -> None:
        """Count these.

        Raises:
            ValueError: If they are more than the budget; it names the last one.
        """
        for what in replaced:
            if what in self.seen:
                continue
            self.seen.add(what)
            if len(self.seen) > self.budget:
                raise ValueError(
                    f"data.corrupt_budget={self.budget} is used up: {what}; run `ksr shards check` "
                    "on the shards and pack the damaged ones again, or raise the budget"
                )
            log.warning("Passed over (%d of %d): %s", len(self.seen), self.budget, what)


class UpdateLoader:
    """A batch for each update from start_update to the last one.

    Its length is that of the whole training, also when it starts later, so that Lightning's
    batch_idx stays the update's number after a resume.

    Args:
        loader: Yields the batches from start_update on, their ``update`` not yet set.
        timeout_s: What the loader waits for a batch, for the message.
        order: What decides which samples an update sees, in words; it goes into checkpoints.
    """

    def __init__(
        self,
        loader: DataLoader,
        *,
        start_update: int,
        num_updates: int,
        budget: CorruptionBudget,
        timeout_s: float | int,
        order: str = "",
    ) -> None:
        self.loader = loader
        self.start_update = start_update
        self.num_updates = num_updates
        self.budget = budget
        self.timeout_s = timeout_s
        self.order = order
        self.next_update = start_update

    def __len__(self) -> int:
        """The updates of the whole training."""
        return self.num_updates

    def __iter__(self) -> Iterator[HiresBatch]:
        batches = iter(self.loader)
        stop = partial(_stop_workers, batches)
        atexit.register(stop)  # runs before multiprocessing's handler, which would wait for ever
        try:
            for update in range(self.start_update, self.num_updates):
                batch = self._next(batches, update)
                self.budget.note(batch.replaced)
                self.next_update = update + 1
                yield batch._replace(update=update)
        finally:
            stop()
            atexit.unregister(stop)

    def state_dict(self) -> dict[str, Any]:
        """Return the update that comes next; with it Lightning knows that a resume is exact."""
        return {"next_update": self.next_update, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that training continues where the checkpoint's loader stopped.

        Other shards or another batch size are allowed, with a warning: the epoch is not exact then.

        Raises:
            ValueError: If start_update was set to another update.
        """
        if state["next_update"] != self.start_update:
            raise ValueError(
                f"datamodule.start_update={self.start_update}, but the checkpoint continues at "
                f"update {state['next_update']}; set start_update to the checkpoint's counter"
            )
        before = state.get("order", self.order)
        if before != self.order:
            log.warning(
                "From update %d on the samples come in another order: the checkpoint was made with "
                "%s, this run has %s. Some of this epoch come twice or not at all; for an exact "
                "resume give what it was made with",
                self.start_update,
                before,
                self.order,
            )

    def _next(self, batches: Iterator[HiresBatch], update: int) -> HiresBatch:
        try:
            return next(batches)
        except (RuntimeError, ValueError, OSError) as error:
            cause = str(error)
            if cause.startswith("Caught "):  # a worker's error, with its whole traceback as text
                raise ValueError(cause.strip().splitlines()[-1].partition(": ")[2]) from error
            if "timed out" in cause:
                raise TimeoutError(
                    f"data.timeout_s={self.timeout_s:g}: no batch came for update {update}; "
                    "the shards' file system hangs or is too slow: look at it, add "
                    "data.num_workers, or raise the timeout"
                ) from error
            explain_lost_worker(error)
            raise


def explain_lost_worker(error: Exception) -> None:
    """Raise a clearer error if this one reports a loader worker that died.

    Torch raises it from a signal handler, so it can surface anywhere in the training.

    Raises:
        ChildProcessError: With what to lower.
    """
    cause = str(error)
    if "DataLoader worker" in cause and ("killed" in cause or "exited" in cause):
        raise ChildProcessError(
            f"a loader worker died ({cause.splitlines()[0]}); if the machine ran out of memory, "
            "lower data.num_workers or data.prefetch_updates, then start the same command again"
        ) from error


def collate_update(samples: list[HiresSample]) -> HiresBatch:
    """Return the batch of one update, its number not yet set.

    A worker's crops are stacked in shared memory at once, which ``default_collate`` does.
    """
    return HiresBatch(
        hires_uint8=default_collate([sample.hires_uint8 for sample in samples]),
        positions=torch.tensor([sample.position for sample in samples]),
        update=-1,
        replaced=tuple(what for sample in samples for what in sample.replaced),
    )


def prepare_worker(_worker: int) -> None:
    """Make a worker ignore the signals that the training handles, and end with the training.

    Slurm signals every process of a step, and a worker that dies of SIGUSR1 or SIGTERM would take
    the training down before it can save. torch ends workers whose parent has died, but the parent
    of a forkserver's workers is the forkserver: both would stay for ever, 350 MB each.
    """
    training = multiprocessing.parent_process()
    if training is not None:
        threading.Thread(target=_end_with, args=(training,), daemon=True).start()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_with(training: Any) -> None:
    training.join()
    os._exit(1)


def _stop_workers(batches: Any) -> None:
    # torch asks the workers to end, then sends SIGTERM to those that hang in a read. They ignore it
    # (prepare_worker), and the interpreter would wait for them when it exits.
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()


class ValidationLoader:
    """This rank's share of a fixed choice of pictures: every world_size-th of them.

    Read in the training process: they are few, and another set of workers would cost more memory
    than it saves time.
    """

    def __init__(
        self,
        pictures: PictureDataset,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        budget: CorruptionBudget,
    ) -> None:
        self.pictures = pictures
        share = range(rank, len(pictures), world_size)
        self.batches = [tuple(share[i : i + batch_size]) for i in range(0, len(share), batch_size)]
        self.budget = budget

    def __len__(self) -> int:
        """How many batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[ValidationBatch]:
        for numbers in self.batches:
            samples = [self.pictures[number] for number in numbers]
            replaced = tuple(what for sample in samples for what in sample.replaced)
            self.budget.note(replaced)
            images = torch.stack([sample.hires_uint8 for sample in samples])
            yield ValidationBatch(images, numbers, replaced)
