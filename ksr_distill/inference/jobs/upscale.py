"""One picture file to one enlarged file, in memory or streamed through the disk."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import torch

from ksr_distill.inference.devices.cpu import return_freed_memory
from ksr_distill.inference.devices.memory import free_memory_bytes, largest_fitting_tile
from ksr_distill.inference.enlarging import draw_seeds, resized
from ksr_distill.inference.jobs.estimate import Estimate, check_disk, estimate_job
from ksr_distill.inference.jobs.planning import Job, Shard
from ksr_distill.inference.jobs.workspace import (
    Workspace,
    begun_job,
    file_fingerprint,
    used_bytes,
    weights_fingerprint,
)
from ksr_distill.inference.pictures.deepzoom import check_replaceable
from ksr_distill.inference.pictures.reading import DEFAULT_MAX_MEGAPIXELS, Picture, open_picture
from ksr_distill.inference.pictures.writing import FORMATS, check_target, write_picture
from ksr_distill.inference.pipeline import KSRFlashPipeline
from ksr_distill.inference.teacher import KSRTeacherPipeline
from ksr_distill.inference.tiling.passes import (
    TilePass,
    Tiling,
    plan_passes,
    run_passes,
    wait_until_whole,
)
from ksr_distill.inference.tiling.tiles import BlendedRaster


@dataclass(frozen=True)
class Settings:
    """All settings that determine the pixels, besides the picture and the model.

    Attributes:
        seed: As ``torch.Generator().manual_seed(seed)`` given to the pipeline.
        tile_px: The largest side of a tile; null means what fits into memory, up to 2048 on a GPU
            and 1280 on a CPU.
        bits: 8 or 16; null means the picture's own where the format can hold it.
    """

    scale: float | int
    seed: int = 0
    num_inference_steps: int | None = None
    refine_steps: int = 0
    match_colours: bool = False
    tile_px: int | None = None
    overlap_px: int | None = None
    tile_batch_size: int = 1
    bits: int | None = None
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of a picture."""

    def planned(self, job: Job, picture: Picture, estimate: Estimate) -> None:
        """Called with the plan, before the first tile."""
        ...

    def tile_done(self) -> None:
        """Called after each finished tile."""
        ...


@dataclass(frozen=True)
class Upscaler:
    """A loaded pipeline with its settings, for any number of pictures.

    Attributes:
        shard: With a count above 1, the tiles of each picture are shared with other processes.
        measure: Times the passes for large jobs; null prints no time.
        is_dry_run: Plan and check, but make nothing.
        turn: A lock held while a picture is planned and computed, so that other threads can only
            read and write theirs meanwhile.
    """

    pipeline: KSRFlashPipeline | KSRTeacherPipeline
    settings: Settings
    shard: Shard
    measure: Callable[[list[TilePass]], list[float]] | None = None
    is_dry_run: bool = False
    turn: AbstractContextManager[Any] = field(default_factory=Lock)

    def run(self, job: Job, progress: Progress) -> None:
        """Enlarge one picture; if its tiles are shared, the first process writes the file.

        Raises:
            ValueError: If the picture is unusable, or the format cannot hold its size.
            OSError: If it cannot be read or written.
        """
        settings = self.settings
        picture = open_picture(job.source, max_megapixels=settings.max_megapixels)
        passes = self._passes()
        bits = self._bits(picture, job.name)
        height, width = (round(side * settings.scale) for side in (picture.height, picture.width))
        has_alpha = picture.alpha is not None
        check_target(job.name, height=height, width=width, bits=bits, has_alpha=has_alpha)
        with self.turn:  # neither what fits nor the speed may depend on another thread's picture
            tiling = self._tiling_of(job, passes)
            estimate = self._estimate(picture, passes, tiling, job.name, bits)
        progress.planned(job, picture, estimate)
        if self.is_dry_run:
            return
        check_replaceable(job.target)
        needed = estimate.file_bytes + estimate.workspace_bytes
        check_disk(job.target.parent, needed - used_bytes(job.target))
        job.target.parent.mkdir(parents=True, exist_ok=True)
        streamed = estimate.workspace_bytes > 0 or self.shard.count > 1
        opened = self._open_workspace(job, tiling) if streamed else nullcontext()
        with opened as workspace:
            self._make(job, picture, passes, tiling, workspace, bits=bits, progress=progress)

    def check(self) -> None:
        """Refuse invalid settings before any picture is opened."""
        passes = self._passes()
        plan_passes(1, 1, passes, self._tiling(passes))

    def _make(
        self,
        job: Job,
        picture: Picture,
        passes: list[TilePass],
        tiling: Tiling,
        workspace: Workspace | None,
        *,
        bits: int,
        progress: Progress,
    ) -> None:
        options = {"open_store": workspace.open_store} if workspace else {}
        index, count = self.shard
        with self.turn:
            enlarged = run_passes(
                picture.colour,
                passes,
                tiling=tiling,
                order=lambda missing: [i for i in missing if i % count == index],
                on_tile=lambda _: progress.tile_done(),
                **options,
            )
        if index > 0:
            return
        if isinstance(enlarged, BlendedRaster):
            wait_until_whole(enlarged)
        result = resized(enlarged, picture.colour, self.settings.scale)
        if workspace:
            return_freed_memory()
        write_picture(result, picture, job.target, name=job.name, bits=bits)
        if workspace:
            workspace.finish()

    def _passes(self) -> list[TilePass]:
        settings = self.settings
        seed = draw_seeds(torch.Generator().manual_seed(settings.seed), 1)[0]
        steps = settings.num_inference_steps
        if isinstance(self.pipeline, KSRTeacherPipeline):
            if settings.refine_steps or settings.match_colours:
                raise ValueError(
                    "--refine-steps and --match-colours belong to a student's folder, this one is "
                    f"a {type(self.pipeline).__name__}; leave them out"
                )
            return self.pipeline.passes(settings.scale, seed=seed, num_inference_steps=steps)
        return self.pipeline.passes(
            settings.scale,
            seed=seed,
            num_inference_steps=steps,
            refine_steps=settings.refine_steps,
            match_colours=settings.match_colours,
        )

    def _tiling(self, passes: list[TilePass]) -> Tiling:
        settings = self.settings
        device = self.pipeline._execution_device
        tile_px = settings.tile_px
        if tile_px is None:
            tile_px = largest_fitting_tile(passes[0], device)
        return Tiling(tile_px, settings.overlap_px, settings.tile_batch_size)

    def _tiling_of(self, job: Job, passes: list[TilePass]) -> Tiling:
        """Return a picture's tiling: that of its own tiles on disk, where memory holds them yet.

        What fits depends on what else runs, and with another size all that is done would be lost.
        """
        tiling, begun = self._tiling(passes), begun_job(job.target)
        tile_px = begun.get("tile_px")
        if self.settings.tile_px is not None or not isinstance(tile_px, int):
            return tiling
        device = self.pipeline._execution_device
        if passes[0].working_bytes(tile_px, tiling.batch) > free_memory_bytes(device):
            return tiling
        resumed = replace(tiling, tile_px=tile_px)
        wanted = json.loads(json.dumps(self._decisive(job, resumed)))
        return resumed if begun == wanted else tiling

    def _bits(self, picture: Picture, name: str) -> int:
        if self.settings.bits is not None:
            return self.settings.bits
        return picture.bits if FORMATS[name].has_16_bits else 8

    def _estimate(
        self, picture: Picture, passes: list[TilePass], tiling: Tiling, name: str, bits: int
    ) -> Estimate:
        options = {"scale": self.settings.scale, "name": name, "bits": bits}
        untimed = estimate_job(picture, passes, tiling, seconds_per_px=None, **options)
        if self.measure is None or not (untimed.workspace_bytes or self.is_dry_run):
            return untimed
        return estimate_job(picture, passes, tiling, seconds_per_px=self._rates, **options)

    @cached_property
    def _rates(self) -> list[float] | None:
        """Seconds per pixel of each pass, measured once: they are every picture's."""
        return None if self.measure is None else self.measure(self._passes())

    def _open_workspace(self, job: Job, tiling: Tiling) -> AbstractContextManager[Workspace]:
        index, count = self.shard
        decisive = self._decisive(job, tiling)
        return Workspace.open(job.target, decisive, worker=index, num_workers=count)

    def _decisive(self, job: Job, tiling: Tiling) -> dict[str, object]:
        """Return everything that decides a pixel."""
        pipeline, settings = self.pipeline, self.settings
        models = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
        return {
            "picture": file_fingerprint(job.source),
            "weights": weights_fingerprint(models),
            "model": {k: v for k, v in pipeline.config.items() if not k.startswith("_")},
            "scale": settings.scale,
            "seed": settings.seed,
            "num_inference_steps": settings.num_inference_steps,
            "refine_steps": settings.refine_steps,
            "match_colours": settings.match_colours,
            "tile_px": tiling.tile_px,
            "overlap_px": tiling.overlap_px,
        }
