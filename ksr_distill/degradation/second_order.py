"""Real-ESRGAN's second-order degradation (arXiv:2107.10833, §3 and figure 2)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.degradation.blur import (
    LARGEST_KERNEL_PX,
    Blur,
    blur_images,
    draw_sinc_kernels,
    filter_where,
)
from ksr_distill.degradation.contract import check_scale, check_sides, in_full_precision
from ksr_distill.degradation.draws import bernoulli, uniform_integers
from ksr_distill.degradation.jpeg import check_quality, jpeg_round_trip, jpeg_where
from ksr_distill.degradation.noise import Noise, add_random_noise
from ksr_distill.degradation.resize import (
    Canvas,
    Resize,
    draw_filters,
    fill_canvas,
    resize_each,
    resize_randomly,
)
from ksr_distill.levels import round_to_8_bit


@dataclass(frozen=True)
class DegradationPass:
    """One order of the model: blur, resize, noise, JPEG (eq. 1).

    Attributes:
        blur: Step 1.
        resize: Step 2.
        noise: Step 3.
        quality_min: Step 4: lowest JPEG quality, 1 to 100.
        quality_max: Highest JPEG quality, included.
    """

    blur: Blur
    resize: Resize
    noise: Noise
    quality_min: int
    quality_max: int

    def __post_init__(self) -> None:
        check_quality(self.quality_min, self.quality_max)


@dataclass(frozen=True)
class SecondOrderDegradation:
    """Two passes, then the size of the lowres image, with a sinc filter before or after JPEG.

    Every sample draws its own parameters, and the batch stays one tensor on its device.

    Attributes:
        scale: Hires side divided by lowres side.
        first: Around the hires size.
        second: Around the lowres size.
        final_sinc_prob: Share of images with a last sinc filter (§3.4).
    """

    scale: int
    first: DegradationPass
    second: DegradationPass
    final_sinc_prob: float

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @torch.no_grad()
    def __call__(
        self, hires: Float[Tensor, "b 3 H W"], *, generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the degraded images in [-1, 1], rounded to 8 bits."""
        check_sides(hires, self.scale)
        height, width = hires.shape[-2:]
        lowres_sides = (height // self.scale, width // self.scale)
        _check_room_for_kernels(lowres_sides)
        with in_full_precision(hires.device):
            canvas = fill_canvas(hires.float())
            canvas = _blur_resize_noise(canvas, (height, width), self.first, generator=generator)
            quality = _draw_quality(self.first, canvas, generator=generator)
            canvas = canvas._replace(images=jpeg_round_trip(canvas.images, quality))
            canvas = _blur_resize_noise(canvas, lowres_sides, self.second, generator=generator)
            lowres = self._finish(canvas, lowres_sides, generator=generator)
        return round_to_8_bit(lowres)

    def _finish(
        self, canvas: Canvas, sides: tuple[int, int], *, generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images of the lowres size: {JPEG, resize, sinc} or {resize, sinc, JPEG} (§3.4)."""
        size, device = len(canvas.images), canvas.images.device
        is_jpeg_last = bernoulli(size, 0.5, device=device, generator=generator)
        has_sinc = bernoulli(size, self.final_sinc_prob, device=device, generator=generator)
        filters = draw_filters(size, device=device, generator=generator)
        kernels = draw_sinc_kernels(size, device=device, generator=generator)
        quality = _draw_quality(self.second, canvas, generator=generator)

        canvas = canvas._replace(images=jpeg_where(canvas.images, ~is_jpeg_last, quality))
        heights, widths = (canvas.heights.new_full((size,), side) for side in sides)
        lowres = resize_each(canvas, (heights, widths), sides, filters)
        lowres = filter_where(lowres, has_sinc, kernels)
        return jpeg_where(lowres, is_jpeg_last, quality)


def _check_room_for_kernels(lowres_sides: tuple[int, int]) -> None:
    """Refuse images that mirrored borders cannot extend by half a kernel."""
    needed = LARGEST_KERNEL_PX // 2 + 1
    if min(lowres_sides) < needed:
        raise ValueError(
            f"degradation: a lowres image of {lowres_sides[1]}x{lowres_sides[0]} px is smaller "
            f"than {needed} px, which {LARGEST_KERNEL_PX} px blur kernels need; use larger crops"
        )


def _blur_resize_noise(
    canvas: Canvas,
    nominal: tuple[int, int],
    order: DegradationPass,
    *,
    generator: torch.Generator,
) -> Canvas:
    blurred = canvas._replace(images=blur_images(canvas.images, order.blur, generator=generator))
    resized = resize_randomly(blurred, nominal, order.resize, generator=generator)
    noisy = add_random_noise(resized.images, order.noise, generator=generator)
    return resized._replace(images=noisy)


def _draw_quality(
    order: DegradationPass, canvas: Canvas, *, generator: torch.Generator
) -> Float[Tensor, " b"]:
    return uniform_integers(
        len(canvas.images),
        order.quality_min,
        order.quality_max,
        device=canvas.images.device,
        generator=generator,
    )
