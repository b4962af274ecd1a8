"""Runs upscalers on photos, and saves, measures and compares every output."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ksr_distill.degradation import Degradation
from ksr_distill.evaluation.benchmark_images import (
    BenchmarkImage,
    Pair,
    load_pair,
    write_image,
)
from ksr_distill.evaluation.cost import Cost, measure_cost
from ksr_distill.evaluation.distributions import feature_distances, native_crops
from ksr_distill.evaluation.feature_network import FeatureNetwork
from ksr_distill.evaluation.lpips import LPIPS
from ksr_distill.evaluation.measure import Values, measure, measure_without_original
from ksr_distill.evaluation.upscalers import LOWRES, ORIGINAL, Upscaled, Upscaler
from ksr_distill.levels import from_levels, round_to_8_bit
from ksr_distill.randomness import Stream, generator_for

SKIPPED_LPIPS = "skipped: give lpips_weights=FILE (torchvision's vgg16 or alexnet)"
SKIPPED_FEATURES = "skipped: give feature_weights=FILE (torchvision's vgg16 or alexnet)"


@dataclass(frozen=True)
class BenchmarkSettings:
    """How the outputs are measured.

    Attributes:
        scale: Hires side / lowres side.
        border_px: Cropped before PSNR, SSIM and MS-SSIM.
        seed: Of every draw: noise, degradation, patches, resamples.
        crop_px: Side of the native-resolution crops of KID and FID.
        degradation: Makes the lowres of photos; without an original, it is applied to the output,
            which is compared with the given lowres.
    """

    scale: int
    border_px: int
    seed: int
    crop_px: int
    device: torch.device
    degradation: Degradation | None = None
    lpips: LPIPS | None = None
    feature_network: FeatureNetwork | None = None


def measuring_device(device: torch.device) -> torch.device:
    """Return where metrics are computed: Apple's GPUs lack the float64 that SSIM needs."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class Row:
    """One output: its image and model, its metrics and its files."""

    image: str
    model: str
    values: Values
    estimates: Mapping[int, Path] = field(default_factory=dict)
    """The files of x̂ by step, counted from 1."""


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured.

    Attributes:
        folder: Pictures lie in `folder/pictures/IMAGE/MODEL.png`.
        of_sets: By model, metrics of the whole set, KID and FID, or why they were skipped.
    """

    folder: Path
    models: Sequence[str]
    images: Sequence[str]
    rows: Sequence[Row]
    num_inference_steps: Mapping[str, int | None]
    of_sets: Mapping[str, Mapping[str, float | str]]
    settings: BenchmarkSettings

    def picture(self, image: str, model: str) -> Path:
        """Return the path of an output (or of `original`, `lowres`)."""
        return self.folder / "pictures" / image / f"{model}.png"


def run_benchmark(
    upscalers: Mapping[str, Upscaler],
    images: Sequence[BenchmarkImage],
    settings: BenchmarkSettings,
    *,
    folder: Path,
    on_output: Callable[[str, str], None],
) -> Benchmark:
    """Return the measurements, having written every picture below the folder.

    Each model sees an image with the same noise. Every model first enlarges one small picture, so
    that no measured time includes the start-up of its kernels.

    Args:
        on_output: Called with (image, model) after each.
    """
    rows: list[Row] = []
    crops: dict[str, list[Tensor]] = {}
    for upscaler in upscalers.values():
        small = torch.zeros(1, 3, 64, 64, device=settings.device)
        upscaler(small, generator=generator_for(settings.seed))
    for number, image in enumerate(images):
        pair = load_pair(
            image,
            scale=settings.scale,
            degradation=settings.degradation,
            generator=generator_for(settings.seed, Stream.DEGRADATION, number),
        )
        _write_inputs(image.name, pair, folder)
        if pair.hires is not None:
            _keep_crops(crops, ORIGINAL, pair.hires, settings)
        for model, upscaler in upscalers.items():
            upscaled, cost = _upscale(upscaler, pair, settings, number)
            _check_size(upscaled, pair, settings.scale, model)
            values = _values(upscaled, cost, pair, settings, number)
            rows.append(
                Row(image.name, model, values, _write_outputs(image.name, model, upscaled, folder))
            )
            _keep_crops(crops, model, round_to_8_bit(upscaled.hires), settings)
            on_output(image.name, model)
    return Benchmark(
        folder=folder,
        models=list(upscalers),
        images=[image.name for image in images],
        rows=rows,
        num_inference_steps={name: u.num_inference_steps for name, u in upscalers.items()},
        of_sets={model: _of_set(model, crops, settings) for model in upscalers},
        settings=settings,
    )


def _upscale(
    upscaler: Upscaler, pair: Pair, settings: BenchmarkSettings, number: int
) -> tuple[Upscaled, Cost]:
    lowres = pair.lowres.to(settings.device)
    generator = generator_for(settings.seed, Stream.INFERENCE, number)
    return measure_cost(lambda: upscaler(lowres, generator=generator), device=settings.device)


def _values(
    upscaled: Upscaled, cost: Cost, pair: Pair, settings: BenchmarkSettings, number: int
) -> Values:
    device = measuring_device(settings.device)
    saved = round_to_8_bit(upscaled.hires.to(device).float())
    megapixels = saved.shape[-2] * saved.shape[-1] / 1e6
    values: dict[str, float | None] = {}
    if pair.hires is not None:
        values |= measure(
            saved,
            pair.hires.to(device),
            scale=settings.scale,
            border_px=settings.border_px,
            seed=number,
            lpips=settings.lpips,
        )
    elif settings.degradation is not None:
        values |= measure_without_original(
            saved, pair.lowres.to(device), degradation=settings.degradation, seed=number
        )
    memory = cost.peak_memory_mib
    return values | {
        "share_out_of_range": 100 * upscaled.share_out_of_range,
        "seconds_per_megapixel": cost.seconds / megapixels,
        "peak_memory_per_megapixel": None if memory is None else memory / megapixels,
    }


def _check_size(upscaled: Upscaled, pair: Pair, scale: int, model: str) -> None:
    wanted = tuple(side * scale for side in pair.lowres.shape[-2:])
    if tuple(upscaled.hires.shape[-2:]) != wanted:
        height, width = upscaled.hires.shape[-2:]
        raise ValueError(
            f"{model} gave {width}x{height} px instead of {wanted[1]}x{wanted[0]}; "
            f"it does not enlarge by {scale}"
        )


def _write_inputs(name: str, pair: Pair, folder: Path) -> None:
    write_image(pair.lowres, folder / "pictures" / name / f"{LOWRES}.png")
    if pair.hires is not None:
        write_image(pair.hires, folder / "pictures" / name / f"{ORIGINAL}.png")


def _write_outputs(name: str, model: str, upscaled: Upscaled, folder: Path) -> dict[int, Path]:
    below = folder / "pictures" / name
    write_image(upscaled.hires, below / f"{model}.png")
    estimates = {e.step: below / f"{model}.step_{e.step}.png" for e in upscaled.estimates}
    for estimate in upscaled.estimates:
        write_image(from_levels(estimate.image), estimates[estimate.step])
    return estimates


def _keep_crops(
    crops: dict[str, list[Tensor]], model: str, image: Tensor, settings: BenchmarkSettings
) -> None:
    if settings.feature_network is not None:
        crops.setdefault(model, []).append(native_crops(image.cpu(), crop_px=settings.crop_px))


def _of_set(
    model: str, crops: Mapping[str, Sequence[Tensor]], settings: BenchmarkSettings
) -> dict[str, float | str]:
    skipped: dict[str, float | str] = {} if settings.lpips else {"lpips": SKIPPED_LPIPS}
    if settings.feature_network is None:
        return skipped | {"kid": SKIPPED_FEATURES, "fid": SKIPPED_FEATURES}
    if ORIGINAL not in crops:
        return skipped | dict.fromkeys(("kid", "fid"), "skipped: there are no originals")
    device = measuring_device(settings.device)
    sets = (torch.cat(list(crops[name])).to(device) for name in (model, ORIGINAL))
    distances = feature_distances(*sets, network=settings.feature_network, seed=settings.seed)
    return skipped | distances._asdict()


def values_of(benchmark: Benchmark, model: str, metric: str) -> dict[str, float]:
    """Return a metric by image, images that have none left out."""
    found = ((row.image, row.values.get(metric)) for row in benchmark.rows if row.model == model)
    return {name: v for name, v in found if v is not None and math.isfinite(v)}
