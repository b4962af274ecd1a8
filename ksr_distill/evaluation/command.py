"""Runs the benchmark that evaluate.py's composed config describes, and writes the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ksr_distill import __version__
from ksr_distill.degradation import Degradation
from ksr_distill.evaluation.benchmark import (
    Benchmark,
    BenchmarkSettings,
    measuring_device,
    run_benchmark,
)
from ksr_distill.evaluation.benchmark_images import BenchmarkImage, common_scale, find_images
from ksr_distill.evaluation.candidates import ToFolder, candidates, check_names
from ksr_distill.evaluation.config import EvaluationConfig
from ksr_distill.evaluation.curves import read_curves
from ksr_distill.evaluation.feature_network import load_feature_network
from ksr_distill.evaluation.lpips import LPIPS
from ksr_distill.evaluation.report import ReportSettings, write_report
from ksr_distill.evaluation.results import write_metrics_json, write_per_image_csv
from ksr_distill.evaluation.uncertainty import NUM_RESAMPLES
from ksr_distill.evaluation.upscalers import (
    ModelSpec,
    StudentUpscaler,
    Upscaler,
    build_baseline,
    build_upscalers,
)
from ksr_distill.inference.model_folders.loading import pick_device

LoadRecipe = Callable[[str, int], Degradation]
"""From a recipe's name and the scale to the degradation."""


def evaluate(composed: Mapping[str, Any], *, to_folder: ToFolder, load_recipe: LoadRecipe) -> Path:
    """Run the benchmark that the composed config describes and return the report's path.

    Raises:
        ValueError: By the config's key, before anything is run.
    """
    config = EvaluationConfig.of(composed)
    folder = config.output_dir
    images = find_images(config.benchmark, config.lowres)[: config.num_images]
    settings = _settings(config, images, load_recipe)
    specs = candidates(config, to_folder)
    check_names(config, [*config.baselines, *(spec.name for spec in specs)])
    upscalers = {
        name: build_baseline(name, scale=settings.scale) for name in config.baselines
    } | build_upscalers(specs, scale=settings.scale, device=settings.device, half=config.half)
    report = ReportSettings(
        title=config.title or _title(config, settings.scale),
        compare_with=config.compare_with,
        judged=config.judged or _judged(config, specs, upscalers),
        sort_by=config.sort_by,
        max_cards=config.max_cards,
        curves=config.curves,
    )
    if config.curves is not None:
        read_curves(config.curves)  # refuses a damaged file before anything is run
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = _run_with_progress(upscalers, images, settings, folder)
    facts = _facts(config, settings, specs)
    write_metrics_json(
        benchmark,
        folder / "metrics.json",
        compare_with=config.compare_with,
        settings={**facts, "config": dict(composed)},
    )
    write_per_image_csv(benchmark, folder / "per_image.csv")
    write_report(benchmark, folder / "report.html", settings=report, facts=facts)
    return folder / "report.html"


def _settings(
    config: EvaluationConfig, images: list[BenchmarkImage], load_recipe: LoadRecipe
) -> BenchmarkSettings:
    scale = common_scale(images) or config.scale
    device = pick_device(config.device)
    lpips_trunk, feature_network = (
        None
        if weights is None
        else load_feature_network(weights, key=key).to(measuring_device(device))
        for key, weights in (
            ("lpips_weights", config.lpips_weights),
            ("feature_weights", config.feature_weights),
        )
    )
    recipe = config.degradation
    if recipe is None and any(image.hires is None or image.lowres is None for image in images):
        raise ValueError(
            "degradation is not set, and there are no pairs; "
            "name what makes the lowres, e.g. degradation=bicubic"
        )
    return BenchmarkSettings(
        scale=scale,
        border_px=scale if config.border_px is None else config.border_px,
        seed=config.seed,
        crop_px=config.crop_px,
        device=device,
        degradation=None if recipe is None else load_recipe(recipe, scale),
        lpips=None if lpips_trunk is None else LPIPS(lpips_trunk).to(measuring_device(device)),
        feature_network=feature_network,
    )


def _run_with_progress(
    upscalers: Mapping[str, Upscaler],
    images: list[BenchmarkImage],
    settings: BenchmarkSettings,
    folder: Path,
) -> Benchmark:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("evaluating", total=len(images) * len(upscalers))

        def on_output(image: str, model: str) -> None:
            progress.update(task, advance=1, description=f"{image} · {model}")

        return run_benchmark(upscalers, images, settings, folder=folder, on_output=on_output)


def _judged(
    config: EvaluationConfig, specs: list[ModelSpec], upscalers: Mapping[str, Upscaler]
) -> str:
    """Return the first model; of a sweep the student with most steps; else the last baseline."""
    if config.model is None and not config.models and config.sweep is not None:
        students = [n for n, u in upscalers.items() if isinstance(u, StudentUpscaler)]
        return max(students, key=lambda name: upscalers[name].num_inference_steps or 0)
    return specs[0].name if specs else list(upscalers)[-1]


def _facts(
    config: EvaluationConfig, settings: BenchmarkSettings, specs: list[ModelSpec]
) -> dict[str, str]:
    """Return how the benchmark was measured, for the report."""
    has_originals = config.benchmark is not None
    return {
        "Images": str(config.benchmark or config.lowres),
        "Lowres": ("as stored" if settings.degradation is None else f"recipe {config.degradation}"),
        "Scale": f"×{settings.scale}",
        "Border": f"{settings.border_px} px cropped before PSNR, SSIM and MS-SSIM",
        "Lowres consistency": (
            "area reduction of output and original"
            if has_originals
            else f"output under recipe {config.degradation} against the stored lowres"
        ),
        "Outputs": "rounded to 8 bits before measuring",
        "Device": f"{settings.device}{', half precision' if config.half else ''}",
        "Software": f"ksr_distill {__version__}, torch {torch.__version__}",
        "Seed": str(settings.seed),
        "Intervals": f"percentile bootstrap over images, {NUM_RESAMPLES:,} resamples",
        **{spec.name: str(spec.path) for spec in specs},
    }


def _title(config: EvaluationConfig, scale: int) -> str:
    folder = (config.benchmark or config.lowres or Path()).resolve()
    parts = [part for part in folder.parts[-2:] if part.lower() != f"x{scale}"]
    return f"{parts[-1]} ×{scale}"
