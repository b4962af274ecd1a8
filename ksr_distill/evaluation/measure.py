"""All metrics of one output."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.degradation import Degradation
from ksr_distill.evaluation import metrics
from ksr_distill.evaluation.distributions import MIN_SIDE_PX, sliced_wasserstein
from ksr_distill.evaluation.lpips import LPIPS
from ksr_distill.evaluation.similarity import MS_SSIM_MIN_SIDE_PX, ms_ssim_y, ssim_y
from ksr_distill.randomness import Stream, generator_for

Values = Mapping[str, float | None]
"""By metric; None where an image is too small for one."""


@torch.no_grad()
def measure(
    image: Float[Tensor, "1 3 H W"],
    hires: Float[Tensor, "1 3 H W"],
    *,
    scale: int,
    border_px: int,
    seed: int,
    lpips: LPIPS | None,
) -> Values:
    """Return every metric of a saved output against its original.

    Args:
        image: As it would be saved, `levels.round_to_8_bit`.
        seed: Of the sliced Wasserstein distance's positions and directions.
    """
    smallest_px = min(hires.shape[-2:])
    values: dict[str, float | None] = {
        "psnr_y": metrics.psnr_y(image, hires, border_px=border_px).item(),
        "ssim_y": ssim_y(image, hires, border_px=border_px).item(),
        "ms_ssim_y": (
            ms_ssim_y(image, hires, border_px=border_px).item()
            if smallest_px - 2 * border_px >= MS_SSIM_MIN_SIDE_PX
            else None
        ),
        "lpips": None if lpips is None else lpips(image, hires).item(),
        "lowres_consistency_psnr": metrics.lowres_consistency_psnr(
            image, hires, scale=scale
        ).item(),
        "top_octave_power_ratio": metrics.top_octave_power_ratio(image, hires).item(),
    }
    return values | _swd(image, hires, seed) | _checkerboard(image, hires) | _colour(image, hires)


@torch.no_grad()
def measure_without_original(
    image: Float[Tensor, "1 3 H W"],
    lowres: Float[Tensor, "1 3 h w"],
    *,
    degradation: Degradation,
    seed: int,
) -> Values:
    """Return the metrics that need no original: the output's consistency with its lowres.

    The output is degraded as the lowres was, and compared with it.
    """
    generator = generator_for(seed, Stream.DEGRADATION, device=image.device)
    degraded = degradation(image, generator=generator)
    return {"lowres_consistency_psnr": metrics.psnr(degraded, lowres, peak=2.0).item()}


def _swd(image: Tensor, hires: Tensor, seed: int) -> dict[str, float | None]:
    if min(hires.shape[-2:]) < MIN_SIDE_PX:
        return {"swd": None}
    generator = generator_for(seed, Stream.EVALUATION)
    levels = sliced_wasserstein(image, hires, generator=generator).tolist()
    by_level = {f"swd_level_{level}": value for level, value in enumerate(levels)}
    return {"swd": sum(levels) / len(levels), **by_level}


def _checkerboard(image: Tensor, hires: Tensor) -> dict[str, float | None]:
    if min(hires.shape[-2:]) < metrics.CHECKERBOARD_TILE_PX:
        return {"checkerboard_peak": None}
    peaks = metrics.checkerboard_peaks(image, hires)[0].tolist()
    periods = metrics.CHECKERBOARD_PERIODS_PX
    by_period = {f"checkerboard_{p}_px": peak for p, peak in zip(periods, peaks, strict=True)}
    return {"checkerboard_peak": max(peaks), **by_period}


def _colour(image: Tensor, hires: Tensor) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    drifts = {"mean": metrics.channel_mean_drift, "std": metrics.channel_std_drift}
    for name, drift in drifts.items():
        levels = (drift(image, hires)[0] * 127.5).tolist()
        values[f"colour_{name}_drift"] = max(abs(level) for level in levels)
        values |= {f"{name}_drift_{c}": level for c, level in zip("rgb", levels, strict=True)}
    return values
