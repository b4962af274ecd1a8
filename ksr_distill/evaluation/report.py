"""report.html: one self-contained file with the table, the plots and the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ksr_distill.evaluation.benchmark import Benchmark, Row, values_of
from ksr_distill.evaluation.catalogue import BY_KEY, METRICS, Metric
from ksr_distill.evaluation.figures import (
    quality_against_speed,
    quality_against_steps,
    training_curves,
)
from ksr_distill.evaluation.report_pictures import (
    choose_view,
    crop_uri,
    enlarged_uri,
    error_uri,
    stage_uri,
)
from ksr_distill.evaluation.results import Intervals, paired_differences, summarise
from ksr_distill.evaluation.uncertainty import Interval
from ksr_distill.evaluation.upscalers import LOWRES, ORIGINAL

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportSettings:
    """What the report shows.

    Attributes:
        compare_with: The model on the slider's left, and the baseline of the differences.
        judged: The model on the slider's right; its crops and its worst images come first.
        sort_by: The metric that puts the worst images first.
        max_cards: Images shown with pictures; the table covers all.
        curves: metrics.csv of a training run, or None.
    """

    title: str
    compare_with: str
    judged: str
    sort_by: str
    max_cards: int
    curves: Path | None

    def __post_init__(self) -> None:
        if self.sort_by not in BY_KEY:
            raise ValueError(f"sort_by={self.sort_by!r} is no metric; use {', '.join(BY_KEY)}")


def write_report(
    benchmark: Benchmark,
    path: Path,
    *,
    settings: ReportSettings,
    facts: Mapping[str, str],
) -> None:
    """Write the report.

    Args:
        facts: How it was measured, as (what, value), shown at the end.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    summary = summarise(benchmark)
    shown = [m for m in METRICS if any(m.key in summary[name] for name in benchmark.models)]
    of_sets = [m for m in METRICS if m not in shown and _has_number(benchmark, m)]
    columns = [m for m in METRICS if m in shown or m in of_sets]
    cards = _worst_first(benchmark, settings)[: settings.max_cards]
    html = environment.get_template("report.html").render(
        settings=settings,
        models=benchmark.models,
        num_images=len(benchmark.images),
        columns=columns,
        table=[_table_row(name, columns, benchmark, summary) for name in benchmark.models],
        differences=_difference_rows(benchmark, shown, settings.compare_with),
        skipped=_skipped(benchmark),
        speed_plots=[Markup(svg) for svg in quality_against_speed(summary)],
        step_plots=[Markup(svg) for svg in quality_against_steps(benchmark, summary)],
        curves=[
            (name, Markup(svg))
            for name, svg in (training_curves(settings.curves) if settings.curves else ())
        ],
        cards=[_card(image, benchmark, settings, shown) for image in cards],
        facts=facts,
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup((TEMPLATES / "report.js").read_text()),
    )
    path.write_text(html)


@dataclass(frozen=True)
class Cell:
    """A formatted number of the table."""

    text: str
    interval: str = ""
    is_best: bool = False
    is_certain: bool = False
    """For a difference: its interval does not contain 0."""


def _table_row(
    model: str, columns: Sequence[Metric], benchmark: Benchmark, summary: Intervals
) -> tuple[str, list[Cell]]:
    cells = []
    for metric in columns:
        number = _of_model(metric, model, benchmark, summary)
        if number is None:
            cells.append(Cell("–"))
            continue
        interval = summary[model].get(metric.key)
        cells.append(
            Cell(
                text=f"{number:.{metric.digits}f}",
                interval="" if interval is None else _range(interval, metric),
                is_best=_is_best(metric, number, benchmark, summary),
            )
        )
    return model, cells


def _of_model(metric: Metric, model: str, benchmark: Benchmark, summary: Intervals) -> float | None:
    if metric.key in summary[model]:
        return summary[model][metric.key].mean
    number = benchmark.of_sets[model].get(metric.key)
    return None if isinstance(number, str) else number


def _is_best(metric: Metric, number: float, benchmark: Benchmark, summary: Intervals) -> bool:
    """Tell whether no model's number, as it is printed, is better."""
    if metric.better == "neither":
        return False
    all_numbers = [_of_model(metric, name, benchmark, summary) for name in benchmark.models]
    rounded = [round(n, metric.digits) for n in all_numbers if n is not None]
    if len(set(rounded)) < 2:
        return False
    best = min(metric.badness(n) for n in rounded)
    return metric.badness(round(number, metric.digits)) <= best


def _difference_rows(
    benchmark: Benchmark, shown: Sequence[Metric], baseline: str
) -> list[tuple[str, list[Cell]]]:
    rows = []
    for model, by_metric in paired_differences(benchmark, baseline).items():
        cells = []
        for metric in shown:
            interval = by_metric.get(metric.key)
            if interval is None:
                cells.append(Cell("–"))
                continue
            cells.append(
                Cell(
                    text=f"{interval.mean:+.{metric.digits}f}",
                    interval=_range(interval, metric, sign="+"),
                    is_certain=interval.low > 0 or interval.high < 0,
                )
            )
        rows.append((model, cells))
    return rows


def _range(interval: Interval, metric: Metric, sign: str = "") -> str:
    return f"{interval.low:{sign}.{metric.digits}f} … {interval.high:{sign}.{metric.digits}f}"


def _has_number(benchmark: Benchmark, metric: Metric) -> bool:
    return any(isinstance(of_set.get(metric.key), float) for of_set in benchmark.of_sets.values())


def _skipped(benchmark: Benchmark) -> dict[str, str]:
    """Return by metric why it was skipped."""
    return {
        BY_KEY[key].title: value
        for of_set in benchmark.of_sets.values()
        for key, value in of_set.items()
        if isinstance(value, str)
    }


def _worst_first(benchmark: Benchmark, settings: ReportSettings) -> list[str]:
    """Return the images, worst first by the judged model's metric; those without it come last."""
    values = values_of(benchmark, settings.judged, settings.sort_by)
    metric = BY_KEY[settings.sort_by]
    return sorted(
        benchmark.images,
        key=lambda image: -metric.badness(values[image]) if image in values else float("inf"),
    )


def _card(
    image: str, benchmark: Benchmark, settings: ReportSettings, shown: Sequence[Metric]
) -> dict[str, Any]:
    """Return what the template needs of one image."""
    original = benchmark.picture(image, ORIGINAL)
    known_original = original if original.exists() else None
    view = choose_view(benchmark.picture(image, settings.judged), known_original)
    names = [*benchmark.models, *([ORIGINAL] if known_original else [])]
    rows = {row.model: row for row in benchmark.rows if row.image == image}
    lowres = benchmark.picture(image, LOWRES)
    pictures = [
        {
            "name": name,
            "stage": stage_uri(benchmark.picture(image, name), view.stage),
            "crop": crop_uri(benchmark.picture(image, name), view.crop),
            "error": (
                error_uri(benchmark.picture(image, name), original, view.stage)
                if known_original and name != ORIGINAL
                else None
            ),
        }
        for name in names
    ]
    return {
        "name": image,
        "stage": view.stage,
        "crop": view.crop,
        "pictures": pictures,
        "left": settings.compare_with,
        "right": settings.judged,
        "has_original": known_original is not None,
        "lowres": enlarged_uri(lowres, view.crop, benchmark.settings.scale),
        "steps": [_steps(row, view.crop) for row in rows.values() if len(row.estimates) > 1],
        "values": {
            name: {m.key: row.values[m.key] for m in shown if row.values.get(m.key) is not None}
            for name, row in rows.items()
        },
    }


def _steps(row: Row, crop: Any) -> dict[str, Any]:
    return {
        "model": row.model,
        "crops": [(step, crop_uri(path, crop)) for step, path in row.estimates.items()],
    }
