"""Tiles of one size that cover a picture, and the blending that hides their borders.

Each tile is sampled alone through all its steps, and only finished tiles are blended, where
MultiDiffusion (arXiv:2302.08113) blends after each step. Three reasons. The noise is a function of
the place (``noise.py``), so overlapping tiles agree anyway: in the ramps both ways are 52.8 dB from
the picture made in one piece (quickstart's student, measured). A tile needs no other tile, so tiles
can be shared by processes, stored, and resumed in any order. And the result is the same whether the
canvas fits into memory or is streamed, because both take the same path.

All tiles have one size because with GroupNorm the output depends on it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.inference.pictures.rasters import Window

SIDE_QUANTUM_PX = 64


@dataclass(frozen=True)
class AxisPlan:
    """Tiles along one axis, spread evenly; the first begins at 0, the last ends at the length.

    Attributes:
        starts: Where each tile begins.
        overlap: Width of the ramp between neighbours, in the middle of what they share.
    """

    length: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    def weights(self, index: int) -> Float[Tensor, " n"]:
        """Return the tile's weight at each of its places; over all tiles they sum to one."""
        start, weights = self.starts[index], torch.ones(self.tile)
        if index > 0:
            low, width = self._ramp(index - 1)
            weights[: low - start] = 0
            weights[low - start : low - start + width] = rising(width)
        if index + 1 < len(self.starts):
            low, width = self._ramp(index)
            weights[low - start : low - start + width] = 1 - rising(width)
            weights[low - start + width :] = 0
        return weights

    def touching(self, start: int, stop: int) -> Iterator[int]:
        """Yield the tiles that have a weight somewhere in [start, stop)."""
        for index in range(len(self.starts)):
            low = self._ramp(index - 1)[0] if index > 0 else 0
            is_last = index + 1 == len(self.starts)
            high = self.length if is_last else sum(self._ramp(index))
            if low < stop and start < high:
                yield index

    def _ramp(self, index: int) -> tuple[int, int]:
        """Return where the ramp from tile index to its successor begins, and its width."""
        shared_start, shared_stop = self.starts[index + 1], self.starts[index] + self.tile
        return (shared_start + shared_stop - self.overlap) // 2, self.overlap


def rising(width: int) -> Float[Tensor, " n"]:
    """Return a raised cosine from 0 to 1, sampled in the middle of its places."""
    return 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(width) + 0.5) / width)


def plan_axis(length: int, *, tile: int, overlap: int, align: int) -> AxisPlan:
    """Return the fewest tiles that cover the length, and these as small as possible.

    Every start is a multiple of ``align``. Sides are multiples of about SIDE_QUANTUM_PX, so that a
    compiled network meets few different shapes.

    Args:
        tile: The largest side. With 1024 and an overlap of 128, a length of 2048 becomes three
            tiles of 768.
    """
    if length <= tile:
        return AxisPlan(length, length, overlap, (0,))
    longest_step = (tile - overlap) // align * align
    count = math.ceil((length - tile) / longest_step) + 1
    quantum = math.ceil(SIDE_QUANTUM_PX / align) * align
    smallest = max((length + (count - 1) * overlap) / count, 4 * overlap)
    largest, tile = tile, math.ceil(smallest / quantum) * quantum
    while math.ceil((length - tile) / align / (count - 1)) * align > tile - overlap:
        tile += quantum
    tile = min(tile, largest)
    steps = (length - tile) // align
    starts = tuple(i * steps // (count - 1) * align for i in range(count))
    return AxisPlan(length, tile, overlap, starts)


@dataclass(frozen=True)
class TilePlan:
    """Tiles over a canvas, numbered row by row."""

    rows: AxisPlan
    columns: AxisPlan

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def window(self, index: int) -> Window:
        """Return the place of a tile."""
        row, column = divmod(index, len(self.columns.starts))
        return Window(
            self.rows.starts[row], self.columns.starts[column], self.rows.tile, self.columns.tile
        )


def plan_tiles(height: int, width: int, *, tile_px: int, overlap_px: int, align: int) -> TilePlan:
    """Return the tiles of a canvas whose sides are multiples of ``align``.

    Args:
        tile_px: Side of a tile; a canvas that is smaller along an axis is one tile there.
        overlap_px: Width of the blended ramps.

    Raises:
        ValueError: If the tile is no multiple of ``align`` or the overlap too wide for it: more
            than a quarter, or so much that the next tile could not begin at another multiple.
    """
    if tile_px < align or tile_px % align:
        raise ValueError(
            f"tile={tile_px} is not a multiple of {align}, the network's stride; "
            f"use {max(tile_px // align, 4) * align}"
        )
    if not 0 <= overlap_px <= tile_px // 4:
        raise ValueError(
            f"overlap={overlap_px} is outside 0…{tile_px // 4}, a quarter of the tile; "
            f"use {tile_px // 8}"
        )
    if tile_px - overlap_px < align:
        raise ValueError(
            f"tile={tile_px} is one stride of the network, which leaves no room for an overlap of "
            f"{overlap_px}; use {4 * align}"
        )
    options = {"tile": tile_px, "overlap": overlap_px, "align": align}
    return TilePlan(plan_axis(height, **options), plan_axis(width, **options))


@runtime_checkable
class TileStore(Protocol):
    """Stores finished tiles until they are blended."""

    def refresh(self) -> None:
        """Look for tiles that other processes have finished meanwhile."""
        ...

    def is_done(self, index: int) -> bool:
        """Tell whether the tile is there, whole."""
        ...

    def write(self, index: int, pixels: Float[Tensor, "c h w"]) -> None:
        """Keep a tile."""
        ...

    def read_rows(self, index: int, top: int, bottom: int) -> Float[Tensor, "c h w"]:
        """Return rows [top, bottom) of a tile, counted from its own upper edge."""
        ...


@dataclass(frozen=True)
class MemoryStore:
    """Tiles in memory, in the dtype that the network gave.

    Attributes:
        stays_on_device: Keep tiles where they were made. For one tile, which the next pass reads
            there; many would fill a GPU.
    """

    stays_on_device: bool = False
    tiles: dict[int, Tensor] = field(default_factory=dict)

    def refresh(self) -> None:
        """Do nothing: a process's memory is its own."""

    def is_done(self, index: int) -> bool:
        """Tell whether the tile is there."""
        return index in self.tiles

    def write(self, index: int, pixels: Float[Tensor, "c h w"]) -> None:
        """Keep a tile."""
        self.tiles[index] = pixels if self.stays_on_device else pixels.cpu()

    def read_rows(self, index: int, top: int, bottom: int) -> Float[Tensor, "c h w"]:
        """Return rows [top, bottom) of a tile."""
        return self.tiles[index][:, top:bottom]


@dataclass(frozen=True)
class BlendedRaster:
    """Finished tiles, read as one picture in [-1, 1].

    The weighted tiles are summed in the order of their numbers, whatever the order in which they
    were made: a pixel is the same to the last bit.

    Attributes:
        height: Of the picture; the plan's canvas may be padded below and to the right.
        width: Likewise.
    """

    plan: TilePlan
    store: TileStore
    height: int
    width: int

    def read(self, window: Window) -> Float[Tensor, "c h w"]:
        """Return a window, blended."""
        rows, columns = self.plan.rows, self.plan.columns
        bottom, right = window.top + window.height, window.left + window.width
        if len(self.plan) == 1:
            pixels = self.store.read_rows(0, window.top, bottom)[:, :, window.left : right]
            return pixels.float().clamp(-1, 1)
        total = torch.zeros(3, window.height, window.width)
        for row in rows.touching(window.top, bottom):
            top = max(rows.starts[row], window.top)
            stop = min(rows.starts[row] + rows.tile, bottom)
            own_rows = slice(top - rows.starts[row], stop - rows.starts[row])
            for column in columns.touching(window.left, right):
                left = max(columns.starts[column], window.left)
                end = min(columns.starts[column] + columns.tile, right)
                own_columns = slice(left - columns.starts[column], end - columns.starts[column])
                index = row * len(columns.starts) + column
                part = self.store.read_rows(index, own_rows.start, own_rows.stop)
                weights = (
                    self._row_weights[row][own_rows, None]
                    * self._column_weights[column][own_columns]
                )
                total[
                    :, top - window.top : stop - window.top, left - window.left : end - window.left
                ] += weights * part[:, :, own_columns].float()
        return total.clamp_(-1, 1)

    @cached_property
    def _row_weights(self) -> list[Tensor]:
        return [self.plan.rows.weights(i) for i in range(len(self.plan.rows.starts))]

    @cached_property
    def _column_weights(self) -> list[Tensor]:
        return [self.plan.columns.weights(i) for i in range(len(self.plan.columns.starts))]
