"""Writes the measurements as metrics.json and per_image.csv."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksr_distill.evaluation.benchmark import Benchmark, values_of
from ksr_distill.evaluation.catalogue import BY_KEY
from ksr_distill.evaluation.uncertainty import Interval, bootstrap_interval

Intervals = Mapping[str, Mapping[str, Interval]]
"""By model, by metric."""


def metric_keys(benchmark: Benchmark) -> list[str]:
    """Return every per-image metric, in the order of measuring."""
    return list(dict.fromkeys(key for row in benchmark.rows for key in row.values))


def summarise(benchmark: Benchmark) -> Intervals:
    """Return each model's means over the images, with 95 % bootstrap intervals."""
    intervals: dict[str, dict[str, Interval]] = {model: {} for model in benchmark.models}
    for model in benchmark.models:
        for key in metric_keys(benchmark):
            values = list(values_of(benchmark, model, key).values())
            if values:
                intervals[model][key] = _interval(values, benchmark)
    return intervals


def paired_differences(benchmark: Benchmark, baseline: str) -> Intervals:
    """Return each model's mean difference to the baseline on the same images.

    Raises:
        ValueError: If the baseline is none of the models.
    """
    if baseline not in benchmark.models:
        raise ValueError(
            f"compare_with={baseline} is not among the models; use {', '.join(benchmark.models)}"
        )
    differences: dict[str, dict[str, Interval]] = {}
    for model in benchmark.models:
        if model == baseline:
            continue
        differences[model] = {}
        for key in metric_keys(benchmark):
            ours, theirs = (values_of(benchmark, name, key) for name in (model, baseline))
            values = [ours[image] - theirs[image] for image in ours if image in theirs]
            if values:
                differences[model][key] = _interval(values, benchmark)
    return differences


def worst_images(benchmark: Benchmark, model: str) -> dict[str, dict[str, str | float]]:
    """Return, by metric, the image on which a model is worst, and its value there."""
    worst: dict[str, dict[str, str | float]] = {}
    for key, metric in BY_KEY.items():
        values = values_of(benchmark, model, key)
        if values:
            image, value = max(values.items(), key=lambda item: metric.badness(item[1]))
            worst[key] = {"image": image, "value": value}
    return worst


def write_metrics_json(
    benchmark: Benchmark,
    path: Path,
    *,
    compare_with: str,
    settings: Mapping[str, Any],
) -> None:
    """Write means, intervals, differences, and how they were measured.

    Layout: `models.NAME.METRIC` is a number, null, or a sentence that begins with "skipped";
    `intervals` and `paired_differences` have [low, high] and {mean, low, high} in its place, and
    `worst` {image, value}.
    """
    summary = summarise(benchmark)
    document = {
        "settings": dict(settings),
        "num_images": len(benchmark.images),
        "compare_with": compare_with,
        "models": {
            model: {"num_inference_steps": benchmark.num_inference_steps[model]}
            | {key: interval.mean for key, interval in summary[model].items()}
            | dict(benchmark.of_sets[model])
            for model in benchmark.models
        },
        "intervals": {
            model: {key: [i.low, i.high] for key, i in summary[model].items()}
            for model in benchmark.models
        },
        "worst": {model: worst_images(benchmark, model) for model in benchmark.models},
        "paired_differences": {
            model: {key: interval._asdict() for key, interval in by_metric.items()}
            for model, by_metric in paired_differences(benchmark, compare_with).items()
        },
    }
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_per_image_csv(benchmark: Benchmark, path: Path) -> None:
    """Write a row per image and model."""
    keys = metric_keys(benchmark)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "model", *keys])
        for row in benchmark.rows:
            numbers = (row.values.get(key) for key in keys)
            cells = ("" if number is None else f"{number:.7g}" for number in numbers)
            writer.writerow([row.image, row.model, *cells])


def _interval(values: Sequence[float], benchmark: Benchmark) -> Interval:
    return bootstrap_interval(np.array(values), seed=benchmark.settings.seed)
