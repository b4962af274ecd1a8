"""Batches for training and validation: crops are read on the CPU and degraded on the device.

Which samples an update sees, and every draw of its degradation, are functions of (seed, update),
however many ranks, loader workers and micro-batches share the batch. The only state is the number
of the next update.
"""

import logging
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from ksr_distill.data.checking import check_sides
from ksr_distill.data.index import read_header
from ksr_distill.data.loading import (
    CorruptionBudget,
    HiresBatch,
    UpdateLoader,
    ValidationBatch,
    ValidationLoader,
    collate_update,
    prepare_worker,
)
from ksr_distill.data.patterns import expand_shards
from ksr_distill.data.plan import SamplePlan, UpdateSampler
from ksr_distill.data.reader import PictureDataset, ShardDataset
from ksr_distill.data.streams import StreamDataset, expand_stream
from ksr_distill.degradation import Degradation
from ksr_distill.levels import from_levels
from ksr_distill.randomness import Stream, generator_for
from ksr_distill.types import Batch

log = logging.getLogger(__name__)


class HiresDataModule(LightningDataModule):
    """What indexed shards and streams share: batch sizes, validation, and the degradation.

    Set ``start_update`` before the loader is made to continue there.

    Args:
        batch_size: Of the global batch, over all ranks and micro-batches.
        micro_batch_size: Of one forward pass on a rank; None for the rank's whole share.
    """

    def __init__(  # noqa: PLR0913  # the arguments are the leaves of conf/data
        self,
        *,
        shards: str | Sequence[str],
        val_shards: str | Sequence[str] | None,
        degradation: Degradation,
        seed: int,
        num_updates: int,
        crop_px: int,
        flip_prob: float | int,
        transpose_prob: float | int,
        batch_size: int,
        micro_batch_size: int | None,
        num_val_pictures: int,
        val_crop_px: int | None,
        val_batch_size: int,
        val_side_multiple: int,
        corrupt_budget: int,
        num_workers: int,
        prefetch_updates: int,
        worker_start_method: Literal["fork", "forkserver", "spawn"] | None,
        timeout_s: float | int,
    ) -> None:
        super().__init__()
        self.shards = shards
        self.val_shards = val_shards
        self.degradation = degradation
        self.scale = degradation.scale
        self.seed = seed
        self.num_updates = num_updates
        self.crop_px = crop_px
        self.flip_prob = flip_prob
        self.transpose_prob = transpose_prob
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.num_val_pictures = num_val_pictures
        self.val_crop_px = val_crop_px
        self.val_batch_size = val_batch_size
        self.val_side_multiple = val_side_multiple
        self.num_workers = num_workers
        self.prefetch_updates = prefetch_updates
        self.worker_start_method = worker_start_method
        self.timeout_s = timeout_s
        self.start_update = 0
        self.budget = CorruptionBudget(corrupt_budget)
        self._validation: PictureDataset | None = None
        self._checked_world_size: int | None = None

    @property
    def world_size(self) -> int:
        """Processes that share the global batch."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """This process."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def accumulate(self) -> int:
        """Micro-batches of each rank in an update."""
        return self._accumulate(self.world_size)

    @property
    def order(self) -> str:
        """Describes what the order of the samples depends on; empty for a stream."""
        return ""

    @property
    @abstractmethod
    def local_shards(self) -> Sequence[Path]:
        """The files that are trained on, once they are checked; those of this machine."""

    def check(self, *, world_size: int) -> None:
        """Check settings and shards, before a model is built.

        Raises:
            ValueError: In one line, with the key, the value, what is allowed and what to do.
        """
        self._accumulate(world_size)
        if self.crop_px % self.scale:
            allowed = self.crop_px // self.scale * self.scale
            raise ValueError(
                f"data.crop_px={self.crop_px} is not a multiple of scale={self.scale}; "
                f"use {allowed}"
            )
        self._check_training()
        self._check_validation(world_size)
        self._checked_world_size = world_size

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning passes it
        """Check, unless ``check`` has run for this number of ranks: it may read 20 000 headers."""
        if self._checked_world_size != self.world_size:
            self.check(world_size=self.world_size)

    def train_dataloader(self) -> UpdateLoader:
        """Return a loader of one batch an update, from start_update on."""
        return UpdateLoader(
            self._training_loader(),
            start_update=self.start_update,
            num_updates=self.num_updates,
            budget=self.budget,
            timeout_s=self.timeout_s,
            order=self.order,
        )

    def val_dataloader(self) -> ValidationLoader | list:
        """Return this rank's share of the validation pictures, always the same."""
        if self._validation is None:
            return []
        return ValidationLoader(
            self._validation,
            batch_size=self.val_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            budget=self.budget,
        )

    def on_after_batch_transfer(
        self, batch: HiresBatch | ValidationBatch, dataloader_idx: int
    ) -> Batch:
        """Degrade the images, on the device they are on now."""
        del dataloader_idx
        hires = from_levels(batch.hires_uint8)
        device = hires.device
        if isinstance(batch, ValidationBatch):
            draws = [
                generator_for(self.seed, Stream.EVALUATION, picture, device=device)
                for picture in batch.pictures
            ]
        else:
            first = self.rank * self.accumulate
            draws = [
                generator_for(self.seed, Stream.DEGRADATION, batch.update, first + i, device=device)
                for i in range(self.accumulate)
            ]
        lowres = [
            self.degradation(part, generator=generator)
            for part, generator in zip(hires.chunk(len(draws)), draws, strict=True)
        ]
        return Batch(hires, torch.cat(lowres))

    @abstractmethod
    def _check_training(self) -> None:
        """Raise ValueError if the training shards cannot be used."""

    @abstractmethod
    def _training_loader(self) -> DataLoader:
        """Return a loader of this rank's batches from start_update on."""

    def _accumulate(self, world_size: int) -> int:
        micro = self.micro_batch_size
        unit = world_size * (micro or 1)
        if self.batch_size % unit:
            below = max(self.batch_size // unit * unit, unit)
            shared = f"{world_size} processes" + (
                f" with micro-batches of {micro}" if micro else ""
            )
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be shared by {shared} "
                f"(data.micro_batch_size={micro}); use a multiple of {unit}, such as {below}"
            )
        return self.batch_size // unit if micro else 1

    def _check_validation(self, world_size: int) -> None:
        if self.val_shards is None:
            return
        shards = expand_shards(self.val_shards, key="data.val_shards")
        self._say_if_trained_on(shards)
        headers = [read_header(shard) for shard in shards]
        least = self.val_crop_px or self.val_side_multiple
        check_sides(shards, headers, least, key="data.val_crop_px")
        if self.val_crop_px is None and self.val_batch_size > 1:
            raise ValueError(
                f"data.val_batch_size={self.val_batch_size} with data.val_crop_px=null: whole "
                "pictures differ in size; use val_batch_size=1, or give val_crop_px"
            )
        if least % self.scale:
            raise ValueError(
                f"data.val_crop_px={self.val_crop_px}, data.val_side_multiple="
                f"{self.val_side_multiple}: not a multiple of scale={self.scale}; "
                f"use {least // self.scale * self.scale}"
            )
        self._validation = PictureDataset(
            shards,
            [header.num_members for header in headers],
            num_pictures=self.num_val_pictures,
            crop_px=self.val_crop_px,
            side_multiple=self.val_side_multiple,
        )
        if len(self._validation) < world_size:
            raise ValueError(
                f"data.val_shards={self.val_shards!r} gives {len(self._validation)} pictures for "
                f"{world_size} processes (data.num_val_pictures={self.num_val_pictures}); each "
                "needs one: give more, or data.val_shards=null"
            )

    def _say_if_trained_on(self, val_shards: Sequence[Path]) -> None:
        both = {path.resolve() for path in val_shards} & {p.resolve() for p in self.local_shards}
        if both:
            log.warning(
                "%d of data.val_shards are among data.shards, such as %s: val/ and best.ckpt then "
                "tell how well pictures are remembered; give shards that are held out",
                len(both),
                min(both),
            )


class ShardDataModule(HiresDataModule):
    """Training on packed, indexed, local shards: exact order, exact resume.

    Args:
        window_shards: Shards whose samples are mixed with one another.
    """

    def __init__(self, *, window_shards: int, **common: Any) -> None:
        super().__init__(**common)
        self.window_shards = window_shards
        self.paths: tuple[Path, ...] = ()
        self.plan: SamplePlan | None = None
        self._fingerprint = 0

    @property
    def order(self) -> str:
        """Describes what the order of the samples depends on: not on where the shards are."""
        return (
            f"data.batch_size={self.batch_size}, data.window_shards={self.window_shards}, "
            f"{len(self.paths)} shards (fingerprint {self._fingerprint:08x})"
        )

    @property
    def local_shards(self) -> Sequence[Path]:
        """The files that are trained on, once they are checked."""
        return self.paths

    def _check_training(self) -> None:
        self.paths = expand_shards(self.shards, key="data.shards")
        headers = [read_header(shard) for shard in self.paths]
        check_sides(self.paths, headers, self.crop_px, key="data.crop_px")
        sizes = [(header.num_members, header.tar_bytes) for header in headers]
        self._fingerprint = zlib.crc32(repr(sizes).encode())
        self.plan = SamplePlan(
            [header.num_members for header in headers],
            seed=self.seed,
            window_shards=self.window_shards,
        )

    def _training_loader(self) -> DataLoader:
        if self.plan is None:
            raise RuntimeError("call check(world_size=…) or setup(stage) first")
        return DataLoader(
            ShardDataset(
                self.paths,
                self.plan,
                crop_px=self.crop_px,
                flip_prob=self.flip_prob,
                transpose_prob=self.transpose_prob,
            ),
            batch_sampler=UpdateSampler(
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                start_update=self.start_update,
                num_updates=self.num_updates,
            ),
            collate_fn=collate_update,
            **worker_options(self),
        )


class StreamDataModule(HiresDataModule):
    """Training on unindexed tars, local or remote, through webdataset with resampling.

    Args:
        shuffle_buffer: Encoded pictures in memory that a worker draws from.
    """

    def __init__(self, *, shuffle_buffer: int, **common: Any) -> None:
        super().__init__(**common)
        self.shuffle_buffer = shuffle_buffer
        self.urls: tuple[str, ...] = ()

    @property
    def local_shards(self) -> Sequence[Path]:
        """The files that are trained on, once they are checked; those of this machine."""
        return [Path(url) for url in self.urls if "://" not in url]

    def _check_training(self) -> None:
        self.urls = expand_stream(self.shards, key="data.shards")

    def _training_loader(self) -> DataLoader:
        log.warning(
            "Reading streams without an index: the order is random, a resume only statistical"
        )
        return DataLoader(
            StreamDataset(
                self.urls,
                entropy=(self.seed, self.start_update, self.rank, self.world_size),
                crop_px=self.crop_px,
                flip_prob=self.flip_prob,
                transpose_prob=self.transpose_prob,
                shuffle_buffer=self.shuffle_buffer,
            ),
            batch_size=self.batch_size // self.world_size,
            collate_fn=collate_update,
            **worker_options(self),
        )


def worker_options(settings: HiresDataModule) -> dict[str, Any]:
    """Return the DataLoader's options about workers.

    The generator is the loader's own, so that starting it leaves the global random state alone.
    """
    options: dict[str, Any] = {
        "num_workers": settings.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
    if settings.num_workers:
        options |= {
            "prefetch_factor": settings.prefetch_updates,
            "multiprocessing_context": settings.worker_start_method,
            "worker_init_fn": prepare_worker,
            "timeout": settings.timeout_s,
        }
    return options
