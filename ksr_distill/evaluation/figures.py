"""Plots as SVG, legible on a phone and in greyscale."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ksr_distill.evaluation.benchmark import Benchmark
from ksr_distill.evaluation.catalogue import BY_KEY, Metric
from ksr_distill.evaluation.curves import read_curves
from ksr_distill.evaluation.results import Intervals

INK, ACCENTS = "#1c2430", ("#0b6e99", "#c2541b", "#5b7f2b", "#7a4a9e", "#8a6d1d")
MARKERS = "osD^v"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp and searchable
    "svg.hashsalt": "ksr",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#d9dde3",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}
SPEED_METRICS = ("psnr_y", "swd")
STEP_METRICS = ("psnr_y", "swd", "top_octave_power_ratio", "lowres_consistency_psnr")
MAX_CURVE_POINTS = 300
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Leaves out matplotlib's metadata, which refers to other sites."""


def quality_against_speed(summary: Intervals) -> list[str]:
    """Return a plot per quality metric: every model over its seconds per megapixel."""
    return [
        _speed_plot(summary, BY_KEY[key])
        for key in SPEED_METRICS
        if sum(key in by_metric for by_metric in summary.values()) > 1
    ]


def quality_against_steps(benchmark: Benchmark, summary: Intervals) -> list[str]:
    """Return a plot per metric over the number of steps; nothing without a series of models.

    A series are models that differ by the number at their name's end: student_1, student_2, …
    """
    series = step_series(benchmark)
    keys = [k for k in STEP_METRICS if all(k in summary[m] for ms in series.values() for m in ms)]
    return [_steps_plot(series, benchmark, summary, BY_KEY[key]) for key in keys if series]


def step_series(benchmark: Benchmark) -> dict[str, list[str]]:
    """Return the models of each series, by its name, in the order of their steps."""
    series: dict[str, list[str]] = {}
    steps = {m: n for m, n in benchmark.num_inference_steps.items() if n is not None}
    for model in sorted(steps, key=lambda name: steps[name]):
        series.setdefault(re.sub(r"[\W_]*\d+$", "", model), []).append(model)
    return {name: models for name, models in series.items() if len({steps[m] for m in models}) > 1}


def training_curves(path: Path) -> list[tuple[str, str]]:
    """Return (metric, plot) for each metric of a run's metrics.csv, validation first.

    Raises:
        ValueError: If the file is missing or has not the columns update, metric, value.
    """
    curves = read_curves(path)
    order = sorted(curves, key=lambda name: (not name.startswith("val/"), name))
    return [(name, _curve_plot(name, curves[name])) for name in order]


def _speed_plot(summary: Intervals, metric: Metric) -> str:
    figure, axes = _figure()
    models = [name for name in summary if metric.key in summary[name]]
    axes.set_xscale("log")
    for model in models:
        seconds = summary[model]["seconds_per_megapixel"].mean
        interval = summary[model][metric.key]
        spread = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axes.errorbar(
            seconds, interval.mean, yerr=spread, fmt="o", color=ACCENTS[0], ecolor="#c5d3dd"
        )
    axes.margins(x=0.3, y=0.12)
    axes.set_xlabel("seconds per megapixel of output")
    axes.set_ylabel(_label(metric))
    figure.draw_without_rendering()
    places = [
        (summary[m]["seconds_per_megapixel"].mean, summary[m][metric.key].mean) for m in models
    ]
    _label_points(axes, dict(zip(models, places, strict=True)))
    return _svg(figure)


def _label_points(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, where it overlaps the fewest points and names."""
    points = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in points.values()]
    for name, (x, y) in points.items():
        width, height = 4.6 * len(name), 9.0  # about what 8 pt letters take
        boxes = [
            Bbox.from_bounds(left, bottom, width, height)
            for distance in range(4)
            for bottom in (y + 3 + distance * height, y - 3 - (distance + 1) * height)
            for left in (x + 5, x - 5 - width)
        ]
        free = min(boxes, key=lambda box: box.count_overlaps(taken))
        taken.append(free)
        axes.annotate(name, (free.x0, free.y0), xycoords="figure pixels", fontsize=8, va="bottom")


def _steps_plot(
    series: Mapping[str, Sequence[str]], benchmark: Benchmark, summary: Intervals, metric: Metric
) -> str:
    figure, axes = _figure()
    ticks: set[int] = set()
    for number, (name, models) in enumerate(series.items()):
        steps = [benchmark.num_inference_steps[model] or 1 for model in models]
        intervals = [summary[model][metric.key] for model in models]
        colour = ACCENTS[number % len(ACCENTS)]
        axes.fill_between(
            steps, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.12
        )
        axes.plot(
            steps, [i.mean for i in intervals], color=colour, marker=MARKERS[number % 5], label=name
        )
        ticks |= set(steps)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.set_ylabel(_label(metric))
    if len(series) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def _curve_plot(name: str, points: Sequence[tuple[float, float]]) -> str:
    figure, axes = _figure(width=3.4, height=2.0)
    stride = -(-len(points) // MAX_CURVE_POINTS)
    groups = [points[i : i + stride] for i in range(0, len(points), stride)]
    updates = [group[-1][0] for group in groups]
    means = [sum(value for _, value in group) / len(group) for group in groups]
    axes.plot(updates, means, color=ACCENTS[0], linewidth=1.2, marker="." * (len(means) == 1))
    axes.set_title(name, fontsize=9, loc="left")
    axes.locator_params(axis="x", nbins=5)
    return _svg(figure)


def _label(metric: Metric) -> str:
    unit = f" [{metric.unit}]" if metric.unit else ""
    return f"{metric.title}{unit} {metric.arrow}"


def _figure(width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        # 72 dots per inch: a pixel is a point of the SVG, so computed label positions hold there.
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element that grows with its box."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)
