"""Write the report: report.html, report.json, votes.csv and the Label Studio files."""

import base64
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ksr_distill.study.charts import category_chart, overall_chart
from ksr_distill.study.exports import write_label_studio, write_votes_csv
from ksr_distill.study.findings import Findings, find, points
from ksr_distill.study.pictures import thumbnail_jpeg
from ksr_distill.study.schema import Pair
from ksr_distill.study.statistics import NUM_REPLICATES, OUTCOMES, Interval, Summary
from ksr_distill.study.tally import Tally, read_tally

THUMBNAIL_PX = 220


def write_report(folder: Path, out: Path, *, seed: int = 0) -> Findings:
    """Write the report's files into ``out`` and return the findings.

    Raises:
        ValueError: The folder is no study, or nobody has voted.
    """
    tally = read_tally(folder)
    findings = find(tally, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_votes_csv(out / "votes.csv", tally.votes)
    write_label_studio(out, tally)
    text = json.dumps(as_json(findings, tally), ensure_ascii=False, indent=2, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(_html(folder, findings, tally), encoding="utf-8")
    return findings


def as_json(findings: Findings, tally: Tally) -> dict[str, Any]:
    """Return the findings with names for keys; shares are fractions of 1."""
    return {
        "question": tally.settings["question"],
        "labels": {"a": tally.settings["label_a"], "b": tally.settings["label_b"]},
        "verdicts": findings.verdicts,
        "overall": _summary(findings.overall),
        "categories": {
            category.name: {
                **_summary(category.summary),
                "holm_p_value": category.holm_p_value,
                "is_decided": category.is_decided,
            }
            for category in findings.categories
        },
        "krippendorff_alpha": _interval(findings.agreement),
        "side_bias": {
            "left": findings.side_left,
            "left_or_right": findings.side_total,
            "p_value": findings.side_p_value,
        },
        "raters": [rater._asdict() for rater in findings.raters],
        "without_flagged": _summary(findings.without_flagged) if findings.without_flagged else None,
        "disputed": [
            {"prompt_id": item.pair.prompt_id, "category": item.pair.category, **item.counts}
            for item in findings.disputed
        ],
        "num_pairs": findings.num_pairs,
        "num_pairs_short_of_votes": findings.num_short,
        "num_undone": tally.num_undone,
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "num_prompts": summary.num_prompts,
        "num_votes": summary.num_votes,
        **{
            outcome: _interval(share)
            for outcome, share in zip(OUTCOMES, summary.shares, strict=True)
        },
        "difference": _interval(summary.difference),
        "standard_error": summary.standard_error,
        "p_value": summary.p_value,
    }


def _interval(interval: Interval) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 6) for value in interval]


def _html(folder: Path, findings: Findings, tally: Tally) -> str:
    environment = Environment(
        loader=PackageLoader("ksr_distill.study"), autoescape=True, trim_blocks=True
    )
    environment.filters["points"] = points
    labels = (tally.settings["label_a"], tally.settings["label_b"])
    charts = [overall_chart(findings.overall, *labels)]
    if findings.categories:
        charts.append(category_chart(findings.categories, *labels))
    return environment.get_template("report.html").render(
        findings=findings,
        settings=tally.settings,
        label_a=labels[0],
        label_b=labels[1],
        charts=[Markup(chart) for chart in charts],  # matplotlib escaped the labels
        disputed=[(item, _thumbnails(folder, item.pair)) for item in findings.disputed],
        num_undone=tally.num_undone,
        num_replicates=NUM_REPLICATES,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _thumbnails(folder: Path, pair: Pair) -> list[str]:
    return [
        "data:image/jpeg;base64,"
        + base64.b64encode(thumbnail_jpeg(folder / "pictures" / name, THUMBNAIL_PX)).decode()
        for name in (pair.picture_a, pair.picture_b)
    ]
