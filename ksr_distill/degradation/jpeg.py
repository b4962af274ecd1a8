"""JPEG on the device: a whole batch at once, each image with its own quality."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ksr_distill.degradation.bicubic import reduce_bicubic
from ksr_distill.degradation.contract import check_scale, check_sides, in_full_precision
from ksr_distill.degradation.draws import bernoulli, uniform_integers
from ksr_distill.levels import from_levels, round_to_8_bit, to_levels

# ITU-T T.81, Annex K, tables K.1 (luminance) and K.2 (chrominance).
LUMINANCE_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF 1.02, p. 3: full-range BT.601; rows Y, Cb, Cr.
RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
YCBCR_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
# A 4:2:0 picture is coded in units of 16 px: 8 px blocks of chroma at half the resolution.
CODED_UNIT_PX = 16


def jpeg_round_trip(
    images: Float[Tensor, "b 3 h w"], quality: Float[Tensor, " b"]
) -> Float[Tensor, "b 3 h w"]:
    """Return the images as a 4:2:0 baseline JPEG file gives them back, in [-1, 1].

    Entropy coding loses nothing and is left out. Rounding is hard, as in a file: kornia's
    differentiable codec rounds softly, which removes part of the damage that is wanted here.

    Args:
        images: Images in [-1, 1].
        quality: 1 to 100, as libjpeg and Pillow count it.
    """
    height, width = images.shape[-2:]
    levels = to_levels(images)
    padding = (0, -width % CODED_UNIT_PX, 0, -height % CODED_UNIT_PX)
    ycbcr = _mix(F.pad(levels, padding, mode="replicate"), RGB_TO_YCBCR).round()
    # Y is centred at 128, chroma at 0 already: the shift of T.81 A.3.1.
    luma = _quantise_blocks(ycbcr[:, :1] - 128, LUMINANCE_TABLE, quality) + 128
    chroma = _quantise_blocks(F.avg_pool2d(ycbcr[:, 1:], 2).round(), CHROMINANCE_TABLE, quality)
    # libjpeg's "fancy upsampling": weights 3/4 and 1/4, which is bilinear at a factor of 2.
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    decoded = _mix(torch.cat([luma, chroma], dim=1), YCBCR_TO_RGB)[..., :height, :width]
    return from_levels(decoded.round().clamp(0, 255))


def jpeg_where(
    images: Float[Tensor, "b 3 h w"],
    chosen: Bool[Tensor, " b"],
    quality: Float[Tensor, " b"],
) -> Float[Tensor, "b 3 h w"]:
    """Return the images, the chosen ones after a JPEG round trip."""
    return torch.where(chosen[:, None, None, None], jpeg_round_trip(images, quality), images)


@dataclass(frozen=True)
class JPEGDegradation:
    """Bicubic reduction, then JPEG: the second stage of KandiSuperRes' own training.

    Attributes:
        scale: Hires side divided by lowres side.
        quality_min: Lowest JPEG quality, 1 to 100.
        quality_max: Highest JPEG quality, included.
        prob: Share of images that meet JPEG; the others are bicubic only.
    """

    scale: int
    quality_min: int
    quality_max: int
    prob: float

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_quality(self.quality_min, self.quality_max)

    @torch.no_grad()
    def __call__(
        self, hires: Float[Tensor, "b 3 H W"], *, generator: torch.Generator
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the reduced and compressed images in [-1, 1], rounded to 8 bits."""
        check_sides(hires, self.scale)
        size, device = len(hires), hires.device
        quality = uniform_integers(
            size, self.quality_min, self.quality_max, device=device, generator=generator
        )
        chosen = bernoulli(size, self.prob, device=device, generator=generator)
        with in_full_precision(device):
            lowres = round_to_8_bit(reduce_bicubic(hires.float(), self.scale))
            return jpeg_where(lowres, chosen, quality)


def check_quality(quality_min: int, quality_max: int) -> None:
    """Refuse a range of qualities that JPEG does not know.

    Raises:
        ValueError: If the range is empty or leaves 1 to 100.
    """
    if not 1 <= quality_min <= quality_max <= 100:
        raise ValueError(
            f"degradation: JPEG quality {quality_min} to {quality_max} is not a range within "
            "1 to 100; use for example 30 to 95"
        )


def _mix(
    images: Float[Tensor, "b 3 h w"], rows: tuple[tuple[float, ...], ...]
) -> Float[Tensor, "b 3 h w"]:
    return torch.einsum("ij,bjhw->bihw", images.new_tensor(rows), images)


def _quantise_blocks(
    planes: Float[Tensor, "b c h w"],
    table: tuple[tuple[int, ...], ...],
    quality: Float[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Return the planes after DCT, quantisation and inverse DCT of their 8 px blocks."""
    b, c, h, w = planes.shape
    dct = _dct_matrix(planes)
    divisors = _scaled_table(planes.new_tensor(table), quality)[:, None, None, None]
    blocks = planes.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    coefficients = (dct @ blocks @ dct.T / divisors).round() * divisors
    restored = dct.T @ coefficients @ dct
    return restored.transpose(3, 4).reshape(b, c, h, w).round()


def _dct_matrix(like: Tensor) -> Float[Tensor, "8 8"]:
    """Return the orthonormal DCT-II (T.81, A.3.3): row = frequency, column = place."""
    place = torch.arange(8, device=like.device, dtype=like.dtype)
    waves = torch.cos((2 * place[None] + 1) * place[:, None] * torch.pi / 16) / 2
    return torch.cat([waves[:1] / 2**0.5, waves[1:]])


def _scaled_table(
    table: Float[Tensor, "8 8"], quality: Float[Tensor, " b"]
) -> Float[Tensor, "b 8 8"]:
    """Return libjpeg's table for a quality (jcparam.c, jpeg_quality_scaling)."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    return ((table * percent[:, None, None] + 50) / 100).floor().clamp(1, 255)
