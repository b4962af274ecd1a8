"""Estimates a job before it starts: pixels, tiles, time, memory and disk."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ksr_distill.inference.devices.memory import as_size
from ksr_distill.inference.jobs.workspace import tile_bytes
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.pictures.reading import Picture
from ksr_distill.inference.tiling.passes import TilePass, Tiling, plan_passes

PROGRAM_BYTES = 450_000_000
"""Of torch and diffusers, imported (measured)."""

STREAM_ABOVE_PX = 8_000_000
"""Outputs of more pixels keep their tiles on disk."""

LONG_SECONDS = 5.0

SPARED_DISK_BYTES = 64 << 20

BYTES_PER_SAMPLE = {"png": 1.0, "tif": 1.4, "jpg": 0.5, "webp": 0.4, "dz": 0.8}
"""Of the written file, per sample and byte of depth: about the worst that a photo needs (a TIFF
with its pyramid has 4/3 of the pixels)."""


@dataclass(frozen=True)
class Estimate:
    """A job in numbers.

    Attributes:
        seconds: Of the tiles, or nothing when it was not measured.
        memory_bytes: Weights and the tiles at work.
        workspace_bytes: Disk while it runs; 0 when the tiles stay in memory.
        file_bytes: Disk that the result takes at most.
    """

    height: int
    width: int
    num_passes: int
    num_tiles: int
    tile_px: int
    seconds: float | None
    memory_bytes: int
    workspace_bytes: int
    file_bytes: int

    def in_words(self) -> str:
        """Return one line for the user."""
        tiles = (
            f"{self.num_tiles} tile{'s' if self.num_tiles > 1 else ''} of up to {self.tile_px} px"
        )
        passes = f"{self.num_passes} pass{'es' if self.num_passes > 1 else ''}"
        duration = "" if self.seconds is None else f"about {as_duration(self.seconds)}, "
        disk = f"{as_size(self.file_bytes)} of disk"
        if self.workspace_bytes:
            disk += f" and {as_size(self.workspace_bytes)} while it runs"
        return (
            f"{self.width}×{self.height} px in {passes}, {tiles}; {duration}"
            f"{as_size(self.memory_bytes)} of memory, up to {disk}"
        )


def estimate_job(
    picture: Picture,
    passes: Sequence[TilePass],
    tiling: Tiling,
    *,
    scale: float | int,
    name: str,
    bits: int,
    seconds_per_px: Sequence[float] | None,
) -> Estimate:
    """Return the estimate of enlarging a picture.

    Args:
        name: The format to write.
        seconds_per_px: Of each pass, from ``measure_speed``.
    """
    height, width = round(picture.height * scale), round(picture.width * scale)
    plans = plan_passes(picture.height, picture.width, passes, tiling)
    pixels = [len(plan) * plan.rows.tile * plan.columns.tile for plan in plans]
    streamed = height * width > STREAM_ABOVE_PX
    stored = sum(
        tile_bytes(plan, tile_pass.dtype) for plan, tile_pass in zip(plans, passes, strict=True)
    )
    bands = (1 if picture.is_grey else 3) + (picture.alpha is not None)
    return Estimate(
        height=height,
        width=width,
        num_passes=len(passes),
        num_tiles=sum(len(plan) for plan in plans),
        tile_px=max(max(plan.rows.tile, plan.columns.tile) for plan in plans),
        seconds=None
        if seconds_per_px is None
        else sum(n * rate for n, rate in zip(pixels, seconds_per_px, strict=True)),
        memory_bytes=PROGRAM_BYTES
        + (0 if streamed else stored)
        + max(
            tile_pass.working_bytes(max(plan.rows.tile, plan.columns.tile), tiling.batch)
            for tile_pass, plan in zip(passes, plans, strict=True)
        ),
        workspace_bytes=stored if streamed else 0,
        file_bytes=math.ceil(height * width * bands * bits / 8 * BYTES_PER_SAMPLE[name]),
    )


@torch.no_grad()
def measure_speed(passes: Sequence[TilePass]) -> list[float]:
    """Return each pass's seconds per output pixel, from one small tile."""
    rates: dict[type, float] = {}
    for tile_pass in passes:
        if type(tile_pass) not in rates:
            rates[type(tile_pass)] = _seconds_per_px(tile_pass)
    return [rates[type(tile_pass)] for tile_pass in passes]


def _seconds_per_px(tile_pass: TilePass) -> float:
    on_gpu = torch.cuda.is_available()
    side = math.ceil((512 if on_gpu else 128) / tile_pass.align) * tile_pass.align
    tiles = torch.zeros(1, 3, side // tile_pass.factor, side // tile_pass.factor)
    seconds = 0.0
    for _ in range(2):  # the first call initialises; where it is long, that hardly counts
        start = time.perf_counter()
        tile_pass(tiles, [Window(0, 0, side, side)]).cpu()
        seconds = time.perf_counter() - start
        if seconds > LONG_SECONDS:
            break
    return seconds / side**2


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a job that would fill the disk, with the numbers."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise OSError(f"{existing} is no folder; use another -o")
    free = shutil.disk_usage(existing).free
    if needed + SPARED_DISK_BYTES > free:
        raise OSError(
            f"{folder} has {as_size(free)} free, but the job needs up to "
            f"{as_size(needed + SPARED_DISK_BYTES)}; free some space, or use another -o, a smaller "
            "--scale or --format jpg"
        )


def as_duration(seconds: float | int) -> str:
    """Return seconds for people: 2 h 05 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
