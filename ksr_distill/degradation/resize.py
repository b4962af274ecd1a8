"""Resizing each image of a batch by its own factor, as two matrix products.

A batch has one shape, the random sizes have many. So the images lie in the upper left corner of a
common canvas, and the last valid row and column are repeated beyond: what comes next (blur, noise,
JPEG blocks) sees a repeated border, as at the border of a picture of that very size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ksr_distill.degradation.draws import categorical, uniform


class Filter(IntEnum):
    """The three filters of arXiv:2107.10833, §3.2; nearest is left out there: it shifts."""

    AREA = 0
    BILINEAR = 1
    BICUBIC = 2


class Canvas(NamedTuple):
    """Images of different sizes in one tensor.

    Attributes:
        images: Each valid in its upper left corner, its border repeated beyond.
        heights: Valid rows of each image.
        widths: Valid columns of each image.
    """

    images: Float[Tensor, "b 3 h w"]
    heights: Float[Tensor, " b"]
    widths: Float[Tensor, " b"]


@dataclass(frozen=True)
class Resize:
    """How the size changes.

    Attributes:
        direction_probs: Shares of enlarging, reducing, keeping; sum to one.
        factor: Smallest and largest factor; reducing draws below 1, enlarging above.
    """

    direction_probs: Sequence[float]
    factor: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.direction_probs) != 3 or abs(sum(self.direction_probs) - 1) > 1e-6:
            raise ValueError(
                f"degradation.*.resize.direction_probs={list(self.direction_probs)} must be "
                "3 shares that sum to 1: enlarge, reduce, keep"
            )
        if not 0 < self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(
                f"degradation.*.resize.factor={list(self.factor)} must enclose 1, "
                "for example [0.15, 1.5]"
            )


def fill_canvas(images: Float[Tensor, "b 3 h w"]) -> Canvas:
    """Return the images as a canvas that they fill."""
    b, _, h, w = images.shape
    heights, widths = images.new_full((b,), h), images.new_full((b,), w)
    return Canvas(images, heights, widths)


def resize_randomly(
    canvas: Canvas, nominal: tuple[int, int], resize: Resize, *, generator: torch.Generator
) -> Canvas:
    """Return the images resized to (random factor) x (nominal height, width).

    Args:
        canvas: What to resize.
        nominal: The size at factor 1, px.
        resize: What may be drawn.
        generator: On the images' device.
    """
    size, device = len(canvas.images), canvas.images.device
    low, high = resize.factor
    direction = categorical(size, resize.direction_probs, device=device, generator=generator)
    share = uniform(size, 0.0, 1.0, device=device, generator=generator)
    factor = torch.where(
        direction == 0,
        1 + (high - 1) * share,
        torch.where(direction == 1, low + (1 - low) * share, 1.0),
    )
    heights, widths = ((factor * side).round().clamp(min=1) for side in nominal)
    # The canvas must not depend on what was drawn: shapes are known without asking the device.
    sides = (round(nominal[0] * high), round(nominal[1] * high))
    filters = draw_filters(size, device=device, generator=generator)
    return Canvas(resize_each(canvas, (heights, widths), sides, filters), heights, widths)


def draw_filters(
    size: int, *, device: torch.device, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Return a filter for each sample, all equally likely."""
    return torch.randint(len(Filter), (size,), device=device, generator=generator)


def resize_each(
    canvas: Canvas,
    sizes: tuple[Float[Tensor, " b"], Float[Tensor, " b"]],
    sides: tuple[int, int],
    filters: Int[Tensor, " b"],
) -> Float[Tensor, "b 3 H W"]:
    """Return every image resized to its own height and width, on a canvas of the given sides."""
    height, width = canvas.images.shape[-2:]
    rows = resampling_matrices(canvas.heights, sizes[0], height, sides[0], filters)
    columns = resampling_matrices(canvas.widths, sizes[1], width, sides[1], filters)
    return rows[:, None] @ canvas.images @ columns[:, None].transpose(-1, -2)


def resampling_matrices(
    old: Float[Tensor, " b"],
    new: Float[Tensor, " b"],
    old_side: int,
    new_side: int,
    filters: Int[Tensor, " b"],
) -> Float[Tensor, "b new_side old_side"]:
    """Return matrices that resample a line of ``old`` pixels to ``new`` pixels.

    Bilinear and bicubic are not antialiased, as in the paper's training: the aliasing of careless
    thumbnails belongs to the damage. Area averages exactly; the cubic has PyTorch's a = -0.75.

    Args:
        old: Valid pixels in a line of each image.
        new: Valid pixels wanted; lines beyond repeat the last one.
        old_side: The canvas' side before.
        new_side: The canvas' side after.
        filters: A Filter for each sample.
    """
    ratio = (old / new)[:, None, None]
    place = torch.arange(new_side, device=old.device, dtype=old.dtype)
    place = torch.minimum(place, new[:, None] - 1)[:, :, None]
    centre = (place + 0.5) * ratio - 0.5
    pixel = torch.arange(old_side, device=old.device, dtype=old.dtype)
    filters = filters[:, None, None]
    weights = torch.where(
        filters == Filter.AREA,
        _overlap(pixel, centre, ratio),
        torch.where(
            filters == Filter.BILINEAR,
            (1 - (pixel - centre).abs()).clamp(min=0),
            _cubic((pixel - centre).abs()),
        ),
    )
    weights = weights * (pixel < old[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def _overlap(
    pixel: Float[Tensor, " n"], centre: Float[Tensor, "b m 1"], ratio: Float[Tensor, "b 1 1"]
) -> Float[Tensor, "b m n"]:
    """Return how much of each old pixel lies under each new one."""
    right = torch.minimum(pixel + 0.5, centre + ratio / 2)
    left = torch.maximum(pixel - 0.5, centre - ratio / 2)
    return (right - left).clamp(min=0)


def _cubic(distance: Float[Tensor, "b m n"], a: float = -0.75) -> Float[Tensor, "b m n"]:
    """Return Keys' kernel (IEEE TASSP 29, 1981, eq. 4, there with a = -0.5)."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
