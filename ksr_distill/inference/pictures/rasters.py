"""Pictures that are read window by window, from memory, a file or tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture or of the noise, in pixels; top and left may be any number ≥ 0."""

    top: int
    left: int
    height: int
    width: int


@runtime_checkable
class Raster(Protocol):
    """A picture of 3 channels in [-1, 1] that can be read in parts."""

    @property
    def height(self) -> int:
        """Rows."""
        ...

    @property
    def width(self) -> int:
        """Columns."""
        ...

    def read(self, window: Window) -> Float[Tensor, "c h w"]:
        """Return a window that lies inside the picture: float32, on the device it lies on."""
        ...


@dataclass(frozen=True)
class TensorRaster:
    """A picture that lies in memory."""

    pixels: Float[Tensor, "c H W"]

    @property
    def height(self) -> int:
        """Rows."""
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        """Columns."""
        return self.pixels.shape[2]

    def read(self, window: Window) -> Float[Tensor, "c h w"]:
        """Return a window of it."""
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        return self.pixels[:, rows, columns].float().cpu()


@dataclass(frozen=True)
class ResampledRaster:
    """Another raster at another size: bicubic (a = -1/2), antialiased, as Pillow does it."""

    source: Raster
    height: int
    width: int

    def read(self, window: Window) -> Float[Tensor, "c h w"]:
        """Return a window, computed from the part of the source that it needs."""
        rows, row_weights = taps(
            self.source.height, self.height, range(window.top, window.top + window.height)
        )
        columns, column_weights = taps(
            self.source.width, self.width, range(window.left, window.left + window.width)
        )
        top, left = int(rows.min()), int(columns.min())
        needed = Window(top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
        pixels = self.source.read(needed)
        pixels = weigh(pixels.mT, rows - top, row_weights).mT
        return weigh(pixels, columns - left, column_weights)


def read_reflected(raster: Raster, window: Window) -> Float[Tensor, "c h w"]:
    """Return a window that may reach over the right and lower edge, where the picture is mirrored.

    The edge itself is not repeated, as in torch's ``reflect``; but a window may be many times
    larger than the picture, down to 1×1.
    """
    rows = reflected(range(window.top, window.top + window.height), raster.height)
    columns = reflected(range(window.left, window.left + window.width), raster.width)
    top, left = int(rows.min()), int(columns.min())
    inside = Window(top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
    pixels = raster.read(inside)
    if (inside.height, inside.width) == (window.height, window.width):
        return pixels
    return pixels[:, rows - top][:, :, columns - left]


def reflected(positions: range, length: int) -> Int[Tensor, " n"]:
    """Return positions ≥ 0 folded back into [0, length)."""
    period = max(2 * (length - 1), 1)
    folded = torch.arange(positions.start, positions.stop) % period
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(folded)


def strips(raster: Raster, *, rows_at_once: int) -> Iterator[Float[Tensor, "c h w"]]:
    """Yield the whole picture from top to bottom in strips of full width."""
    for top in range(0, raster.height, rows_at_once):
        yield raster.read(Window(top, 0, min(rows_at_once, raster.height - top), raster.width))


def taps(
    in_length: int, out_length: int, positions: range
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return which samples of an axis make the given samples of its resized self, and how much.

    Keys' cubic kernel with a = -1/2 (IEEE TASSP 29, 1981), stretched by the factor of a reduction.
    """
    stretch = max(in_length / out_length, 1.0)
    out = torch.arange(positions.start, positions.stop, dtype=torch.float64)
    centre = (out + 0.5) * (in_length / out_length) - 0.5
    num_taps = 2 * int(torch.tensor(2 * stretch).ceil()) + 1
    first = (centre - 2 * stretch).ceil().long()
    index = first[:, None] + torch.arange(num_taps)
    is_inside = (index >= 0) & (index < in_length)
    weights = cubic((index - centre[:, None]) / stretch) * is_inside
    weights = weights / weights.sum(dim=1, keepdim=True)
    return index.clamp(0, in_length - 1), weights.float()


def cubic(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return Keys' kernel: 1 at 0, 0 at ±1 and from ±2 on."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def weigh(
    pixels: Float[Tensor, "c h w"], index: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
) -> Float[Tensor, "c h n"]:
    """Return the last axis resampled, one tap after the other so that memory stays small."""
    index, weights = index.to(pixels.device), weights.to(pixels.device)
    total = torch.zeros(*pixels.shape[:2], index.shape[0], device=pixels.device)
    for tap in range(index.shape[1]):
        total += weights[:, tap] * pixels[:, :, index[:, tap]]
    return total
