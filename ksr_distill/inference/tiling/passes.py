"""Runs a pass: every tile of a picture through a network, within the memory available."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.diffusion import NoiseSchedule, sample_few_steps
from ksr_distill.inference.devices.memory import ACCELERATED_UNET_PER_PX, peak_bytes
from ksr_distill.inference.pictures.rasters import Raster, Window, read_reflected
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.tiles import (
    BlendedRaster,
    MemoryStore,
    TilePlan,
    TileStore,
    plan_tiles,
)
from ksr_distill.models import KSRUNet
from ksr_distill.types import Denoiser, StepObserver

logger = logging.getLogger(__name__)

SMALLEST_TILE_PX = 64

CPU_OVERLAP_PX = 48
"""Largest default overlap of a student's tiles on a CPU. A megapixel doubled is then four tiles of
1024 px with 5 % of its pixels computed twice (18 % with 160 px). A border's band differs from the
picture made in one piece by 54.4 dB with 16 px, 54.9 with 48, 55.7 with 96 (measured)."""

STUDENT_SCHEDULE = NoiseSchedule("linear")
"""Shared by all tiles, so that its tables are copied to the device only once."""

POLL_SECONDS, MAX_POLL_SECONDS = 0.1, 10.0


@runtime_checkable
class TilePass(Protocol):
    """One network's work on a batch of tiles."""

    @property
    def stage(self) -> int:
        """Which pass of the job this is, from 0."""
        ...

    @property
    def factor(self) -> int:
        """How much larger a tile comes out than it went in."""
        ...

    @property
    def align(self) -> int:
        """Corners and sides of tiles must be multiples of this, in output pixels."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which finished tiles are stored without loss."""
        ...

    @property
    def largest_tile_px(self) -> int | None:
        """The largest side of a tile that the network allows; None: no limit."""
        ...

    @property
    def widest_overlap_px(self) -> int | None:
        """The largest default overlap of tiles; None: no limit."""
        ...

    def working_bytes(self, tile_px: int, batch: int) -> int:
        """Return an estimate of the memory for the weights and a batch of tiles."""
        ...

    def __call__(
        self, tiles: Float[Tensor, "b 3 h w"], windows: Sequence[Window]
    ) -> Float[Tensor, "b 3 H W"]:
        """Return the tiles' results; the windows say where they lie in the output."""
        ...


@dataclass(frozen=True)
class SuperResolutionPass:
    """The student's few steps on each tile, with the noise of the tile's place."""

    denoise: Denoiser
    timesteps: Sequence[int]
    noise: PlaceNoise
    factor: int
    align: int
    device: torch.device
    dtype: torch.dtype
    on_step: StepObserver | None = None
    largest_tile_px: int | None = None

    @property
    def stage(self) -> int:
        """Which pass of the job this is."""
        return self.noise.stage

    @property
    def widest_overlap_px(self) -> int | None:
        """Limited on a CPU, where time matters more than the last tenths of a dB at a border."""
        return CPU_OVERLAP_PX if self.device.type == "cpu" else None

    def working_bytes(self, tile_px: int, batch: int) -> int:
        """Return about what the weights and a batch of tiles need."""
        network = cast(KSRUNet, self.denoise)
        config = network.config
        return peak_bytes(
            [network],
            px=batch * tile_px**2,
            channels=config.stem_channels or config.base_channels,
            dtype=self.dtype,
            device=self.device,
            accelerated_per_px=ACCELERATED_UNET_PER_PX,
        )

    def __call__(
        self, tiles: Float[Tensor, "b 3 h w"], windows: Sequence[Window]
    ) -> Float[Tensor, "b 3 H W"]:
        """Return the enlarged tiles.

        A CPU takes them one at a time: batches gain nothing there, and oneDNN rounds differently
        for each batch size (1e-6, measured), so pixels would depend on it.
        """
        if self.device.type == "cpu" and len(windows) > 1:
            return torch.cat(
                [self(tile[None], [window]) for tile, window in zip(tiles, windows, strict=True)]
            )
        return sample_few_steps(
            self.denoise,
            tiles.to(self.device),
            timesteps=self.timesteps,
            schedule=STUDENT_SCHEDULE,
            draw_noise=self.noise.source(windows, device=self.device),
            on_step=self.on_step,
        ).to(self.dtype)


@dataclass(frozen=True)
class Tiling:
    """How a canvas is cut.

    Attributes:
        tile_px: Largest side of a tile in output pixels of a pass; each pass rounds it down to its
            network's stride.
        overlap_px: Width of the blended ramps; null means an eighth of the tile, within the bound
            of the pass.
        batch: Tiles at once.
    """

    tile_px: int
    overlap_px: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        """Refuse a batch that no tile fits into."""
        if self.batch < 1:
            raise ValueError(f"tile_batch_size={self.batch} is not allowed; use a number ≥ 1")

    def plan(self, height: int, width: int, tile_pass: TilePass) -> TilePlan:
        """Return the tiles of a pass whose output has this size, before padding."""
        align = tile_pass.align
        largest = min(self.tile_px, tile_pass.largest_tile_px or self.tile_px)
        tile_px = largest // align * align or self.tile_px
        overlap_px = self.overlap_px
        if overlap_px is None:
            overlap_px = min(tile_px // 8, tile_pass.widest_overlap_px or tile_px)
        return plan_tiles(
            math.ceil(height / align) * align,
            math.ceil(width / align) * align,
            tile_px=tile_px,
            overlap_px=overlap_px if tile_px == self.tile_px else min(overlap_px, tile_px // 4),
            align=align,
        )

    def smaller(self, plan: TilePlan, align: int) -> "Tiling":
        """Return a tiling for about half the memory: half the batch, or else half the tile."""
        if self.batch > 1:
            return replace(self, batch=self.batch // 2)
        side = max(plan.rows.tile, plan.columns.tile)
        half = side // 2 // align * align
        if half < max(SMALLEST_TILE_PX, 2 * align):  # one stride leaves no room for an overlap
            raise ValueError(
                f"out of memory with tile={side}, the smallest; use --device cpu, a smaller model, "
                "or free some memory"
            )
        overlap_px = None if self.overlap_px is None else min(self.overlap_px, half // 4)
        return Tiling(half, overlap_px, 1)


def plan_passes(
    height: int, width: int, passes: Sequence[TilePass], tiling: Tiling
) -> list[TilePlan]:
    """Return each pass's tiles for a source of this size."""
    plans = []
    for tile_pass in passes:
        height, width = height * tile_pass.factor, width * tile_pass.factor
        plans.append(tiling.plan(height, width, tile_pass))
    return plans


OpenStore = Callable[[TilePass, TilePlan], TileStore]


def store_in_memory(tile_pass: TilePass, plan: TilePlan) -> TileStore:  # noqa: ARG001
    """Return an empty store in memory: the device's for a single tile, the host's for many."""
    return MemoryStore(stays_on_device=len(plan) == 1)


def run_passes(
    source: Raster,
    passes: Sequence[TilePass],
    *,
    tiling: Tiling,
    open_store: OpenStore = store_in_memory,
    order: Callable[[Sequence[int]], Sequence[int]] = list,
    on_tile: Callable[[int], None] | None = None,
) -> Raster:
    """Return the picture after all passes; each begins when the one before has all its tiles.

    Args:
        open_store: Gives a pass its store; tiles that are done there are not made again.
        order: The tiles to make, in their order, from the tiles that are missing. A process that
            shares the work with others returns its part of them, and waits for the rest between
            passes; for those of the last pass ``wait_until_whole`` waits.
        on_tile: Called with the pass's stage after each tile.
    """
    for tile_pass in passes:
        if isinstance(source, BlendedRaster):
            wait_until_whole(source)
        source, tiling = run_pass(
            source, tile_pass, tiling=tiling, open_store=open_store, order=order, on_tile=on_tile
        )
    return source


@torch.no_grad()
def run_pass(
    source: Raster,
    tile_pass: TilePass,
    *,
    tiling: Tiling,
    open_store: OpenStore = store_in_memory,
    order: Callable[[Sequence[int]], Sequence[int]] = list,
    on_tile: Callable[[int], None] | None = None,
) -> tuple[BlendedRaster, Tiling]:
    """Return the pass's picture, and the tiling that fitted into memory."""
    height, width = source.height * tile_pass.factor, source.width * tile_pass.factor
    while True:
        plan = tiling.plan(height, width, tile_pass)
        store = open_store(tile_pass, plan)
        missing = order([i for i in range(len(plan)) if not store.is_done(i)])
        fitted = _make_tiles(source, tile_pass, plan, store, missing, tiling, on_tile)
        if fitted.tile_px == tiling.tile_px:
            return BlendedRaster(plan, store, height, width), fitted
        tiling = fitted


def wait_until_whole(raster: BlendedRaster) -> None:
    """Wait until every tile is finished, by this process or by another."""
    wait = POLL_SECONDS
    while missing := sum(not raster.store.is_done(i) for i in range(len(raster.plan))):
        logger.info("waiting for %d tiles of other processes", missing)
        time.sleep(wait)
        wait = min(2 * wait, MAX_POLL_SECONDS)
        raster.store.refresh()


def _make_tiles(
    source: Raster,
    tile_pass: TilePass,
    plan: TilePlan,
    store: TileStore,
    missing: Sequence[int],
    tiling: Tiling,
    on_tile: Callable[[int], None] | None,
) -> Tiling:
    """Fill the store; return early, with a smaller tile, where this one does not fit."""
    done = 0
    while done < len(missing):
        batch = missing[done : done + tiling.batch]
        windows = [plan.window(index) for index in batch]
        tiles = torch.stack([_read_input(source, window, tile_pass.factor) for window in windows])
        results = _unless_out_of_memory(tile_pass, tiles, windows)
        if results is None:
            smaller = tiling.smaller(plan, tile_pass.align)
            logger.warning("out of memory: going on with %s", _in_words(smaller))
            if smaller.tile_px != tiling.tile_px:
                return smaller
            tiling = smaller
            continue
        for index, result in zip(batch, results, strict=True):
            store.write(index, result)
            if on_tile is not None:
                on_tile(tile_pass.stage)
        done += len(batch)
    return tiling


def _read_input(source: Raster, window: Window, factor: int) -> Float[Tensor, "3 h w"]:
    sides = (window.top, window.left, window.height, window.width)
    return read_reflected(source, Window(*(side // factor for side in sides)))


def _unless_out_of_memory(
    tile_pass: TilePass, tiles: Tensor, windows: Sequence[Window]
) -> Tensor | None:
    """Return the results, or None if memory ran out, with everything freed."""
    try:
        return tile_pass(tiles, windows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocation failed, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _in_words(tiling: Tiling) -> str:
    return f"{tiling.batch} tile{'s' if tiling.batch > 1 else ''} of {tiling.tile_px} px at once"
