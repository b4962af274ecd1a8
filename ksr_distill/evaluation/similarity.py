"""SSIM and MS-SSIM of the Y channel.

Implemented here because torchmetrics includes the reflected border, and so differs in the second
decimal from the authors' code, which published tables follow.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ksr_distill.evaluation.metrics import crop_border, luma

# Wang et al., "Image quality assessment", IEEE TIP 2004, §III.C; L = 255.
WINDOW_PX = 11
WINDOW_SIGMA = 1.5
C_1, C_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Wang et al., "Multi-scale structural similarity", Asilomar 2003, §4.2.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Five scales halve the image four times, and the window must fit into the last one.
MS_SSIM_MIN_SIDE_PX = WINDOW_PX * 2 ** (len(SCALE_WEIGHTS) - 1)


class _Similarity(NamedTuple):
    ssim: Float[Tensor, " b"]
    contrast_structure: Float[Tensor, " b"]


def ssim_y(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"], *, border_px: int
) -> Float[Tensor, " b"]:
    """Return the SSIM of the Y channel (Wang et al. 2004), where the whole window fits.

    Args:
        border_px: Cropped at each side before measuring; by custom the upscaling factor.
    """
    ours, theirs = crop_border(luma(images), border_px), crop_border(luma(hires), border_px)
    return _similarity(ours, theirs).ssim


def ms_ssim_y(
    images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"], *, border_px: int
) -> Float[Tensor, " b"]:
    """Return the MS-SSIM of the Y channel (Wang et al. 2003: five scales).

    Raises:
        ValueError: If a cropped side is below `MS_SSIM_MIN_SIDE_PX`.
    """
    ours, theirs = crop_border(luma(images), border_px), crop_border(luma(hires), border_px)
    if min(ours.shape[-2:]) < MS_SSIM_MIN_SIDE_PX:
        raise ValueError(
            f"images of {ours.shape[-1]}x{ours.shape[-2]} px are too small for MS-SSIM; "
            f"give at least {MS_SSIM_MIN_SIDE_PX} px a side after the border is cropped"
        )
    product = ours.new_ones(ours.shape[0])
    for weight in SCALE_WEIGHTS[:-1]:
        # Clamped: a negative number has no fractional power.
        product *= _similarity(ours, theirs).contrast_structure.clamp_min(0) ** weight
        ours, theirs = F.avg_pool2d(ours, 2), F.avg_pool2d(theirs, 2)
    return product * _similarity(ours, theirs).ssim.clamp_min(0) ** SCALE_WEIGHTS[-1]


def _similarity(ours: Float[Tensor, "b 1 H W"], theirs: Float[Tensor, "b 1 H W"]) -> _Similarity:
    """Return SSIM and its contrast-structure part, both averaged over places (2004, eq. 12-13)."""
    # Double: variances are small differences of large squares.
    ours, theirs = ours.double(), theirs.double()
    stacked = torch.cat([ours, theirs, ours**2, theirs**2, ours * theirs], dim=1)
    mean_a, mean_b, square_a, square_b, product = _window_means(stacked).unbind(dim=1)
    variances = square_a + square_b - mean_a**2 - mean_b**2
    covariance = product - mean_a * mean_b
    contrast_structure = (2 * covariance + C_2) / (variances + C_2)
    luminance = (2 * mean_a * mean_b + C_1) / (mean_a**2 + mean_b**2 + C_1)
    return _Similarity(
        ssim=(luminance * contrast_structure).mean(dim=(1, 2)).float(),
        contrast_structure=contrast_structure.mean(dim=(1, 2)).float(),
    )


def _window_means(stacked: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c _H _W"]:
    offsets = torch.arange(WINDOW_PX, device=stacked.device) - WINDOW_PX // 2
    taps = torch.exp(-(offsets.to(stacked.dtype) ** 2) / (2 * WINDOW_SIGMA**2))
    taps = (taps / taps.sum()).expand(stacked.shape[1], 1, 1, WINDOW_PX)
    across = F.conv2d(stacked, taps, groups=stacked.shape[1])
    return F.conv2d(across, taps.mT, groups=stacked.shape[1])
