"""Validation: samples of the averaged network, on fixed pictures and with fixed noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ksr_distill.diffusion import NoiseSchedule, noise_from, sample_few_steps, sample_teacher
from ksr_distill.evaluation.distributions import sliced_wasserstein
from ksr_distill.evaluation.metrics import (
    checkerboard_peaks,
    lowres_consistency_psnr,
    psnr_y,
    top_octave_power_ratio,
)
from ksr_distill.levels import to_levels
from ksr_distill.randomness import Stream, generator_for
from ksr_distill.types import Batch, Denoiser, NoiseSource

if TYPE_CHECKING:
    from ksr_distill.training.base import UpdateModule

Sampler = Callable[[Tensor, NoiseSource], Tensor]
"""(lowres, noise source of the output's size) → pred_x_0."""

METRICS = (
    "psnr_y",
    "top_octave_power_ratio",
    "lowres_consistency_psnr",
    "checkerboard_peak",
    "swd",
)
NUM_PREVIEWS = 4
PREVIEW_PX = 384


def few_step_sampler(
    denoise: Denoiser, schedule: NoiseSchedule, timesteps: Sequence[int]
) -> Sampler:
    """Return the one few-step loop with its network and timesteps filled in."""
    return lambda lowres, draw_noise: sample_few_steps(
        denoise, lowres, timesteps=timesteps, schedule=schedule, draw_noise=draw_noise
    )


def five_step_sampler(teacher: Denoiser) -> Sampler:
    """Return the teacher's released sampler."""
    return lambda lowres, draw_noise: sample_teacher(teacher, lowres, start=draw_noise(0))


@torch.no_grad()
def validate_batch(
    module: "UpdateModule", batch: Batch, batch_idx: int, samplers: Mapping[str, Sampler]
) -> None:
    """Log the metrics of every sampler; keep the first pictures for the previews.

    The noise is a function of the seed and the batch's number on its rank, so that two validations
    of a run differ by the weights and by nothing else.

    Args:
        samplers: The first one's metrics are logged as ``val/psnr_y`` and so on; the others' are
            prefixed by their name.
    """
    hires, lowres = batch
    pictures = {}
    for i, (name, sample) in enumerate(samplers.items()):
        generator = generator_for(module.seed, Stream.PREVIEW, batch_idx, device=hires.device)
        image = sample(lowres, noise_from(generator, hires.shape, device=hires.device))
        pictures[name] = image.clamp(-1, 1)
        prefix = "val" if i == 0 else f"val/{name}"
        for metric, value in picture_metrics(image, hires, module.scale, batch_idx).items():
            module.log(f"{prefix}/{metric}", value, batch_size=len(hires), sync_dist=True,
                       logger=False, add_dataloader_idx=False)  # fmt: skip
    if batch_idx < NUM_PREVIEWS:
        large = torch.nn.functional.interpolate(lowres, hires.shape[-2:], mode="nearest")
        module.previews.append({"lowres": large, **pictures, "hires": hires})


def check_monitor(monitor: str | None, samplers: Iterable[str]) -> None:
    """Refuse, before the start, to choose the best checkpoint by what no validation logs.

    Raises:
        ValueError: With all that there is.
    """
    prefixes = ["val", *(f"val/{name}" for name in list(samplers)[1:])]
    logged = [f"{prefix}/{metric}" for prefix in prefixes for metric in METRICS]
    if monitor is not None and monitor not in logged:
        raise ValueError(
            f"callbacks.checkpoint.monitor={monitor!r} is not among what validation logs; use one "
            f"of {', '.join(logged)}, or null"
        )


def picture_metrics(
    image: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"], scale: int, number: int
) -> dict[str, Tensor]:
    """Return the batch means of the metrics that validation logs."""
    image = image.clamp(-1, 1)
    distances = [
        sliced_wasserstein(a[None], b[None], generator=generator_for(number, Stream.EVALUATION))
        for a, b in zip(image, hires, strict=True)
    ]
    values = (
        psnr_y(image, hires, border_px=scale).mean(),
        top_octave_power_ratio(image, hires).mean(),
        lowres_consistency_psnr(image, hires, scale=scale).mean(),
        checkerboard_peaks(image, hires).amax(dim=1).mean(),
        torch.stack(distances).mean(),
    )
    return dict(zip(METRICS, values, strict=True))


def save_previews(previews: Sequence[Mapping[str, Tensor]], path: Path) -> None:
    """Write a sheet with a row for each picture: lowres | samples | hires, centre crops."""
    rows = [torch.cat([_tile(image) for image in row.values()], dim=2) for row in previews]
    width = max(row.shape[2] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    sheet = to_levels(torch.cat(padded, dim=1).permute(1, 2, 0)).byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    Image.fromarray(sheet.cpu().numpy()).save(temporary)
    temporary.replace(path)


def _tile(image: Tensor) -> Float[Tensor, "3 _h _w"]:
    """Return the first image's centre at PREVIEW_PX; smaller images are enlarged by repetition."""
    image = image[:1].float().clamp(-1, 1)
    side = min(image.shape[-2:])
    repeat = max(1, PREVIEW_PX // side)
    image = image.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)
    height, width = image.shape[-2:]
    top, left = max(0, height - PREVIEW_PX) // 2, max(0, width - PREVIEW_PX) // 2
    image = image[0, :, top : top + PREVIEW_PX, left : left + PREVIEW_PX]
    right, bottom = PREVIEW_PX - image.shape[2], PREVIEW_PX - image.shape[1]
    return torch.nn.functional.pad(image, (0, right, 0, bottom), value=-1.0)
