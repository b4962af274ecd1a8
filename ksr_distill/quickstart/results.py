"""Adds the quickstart's summary to metrics.json, and the enlarged photo to report.html."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ksr_distill.quickstart.ledger import Ledger

# Names in our metrics.json, and in evaluate.py's: its teacher_1 is the estimate in one step.
MODELS = {"bicubic": "bicubic", "teacher": "teacher_1", "student_4": "student_4"}
METRICS = ("psnr_y", "top_octave_power_ratio")
CROP_PX = 128


def merge_curves(runs: Mapping[str, Path], out: Path) -> None:
    """Write the curves of several runs into one file, each metric after its run's name.

    Args:
        runs: metrics.csv by run.
        out: The file to write: update, metric, value.
    """
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("update", "metric", "value"))
        for run, path in runs.items():
            with path.open(newline="") as source:
                for row in csv.DictReader(source):
                    writer.writerow((row["update"], f"{run}: {row['metric']}", row["value"]))


def add_usage(metrics_file: Path, ledger: Ledger) -> dict[str, Any]:
    """Add the quickstart's summary to evaluate.py's metrics.json; return it.

    Raises:
        ValueError: If evaluate.py measured other models than the quickstart's.
    """
    measured = json.loads(metrics_file.read_text())
    missing = [name for name in MODELS.values() if name not in measured["models"]]
    if missing:
        raise ValueError(
            f"{metrics_file} has no {', '.join(missing)}; "
            "conf/evaluation/experiment/quickstart.yaml must name them"
        )
    summary: dict[str, Any] = {
        "seconds": round(ledger.seconds, 1),
        "peak_rss_gb": round(ledger.peak_rss_gb, 3),
    }
    for name, model in MODELS.items():
        summary[name] = {metric: measured["models"][model][metric] for metric in METRICS}
    metrics_file.write_text(json.dumps({**measured, **summary}, indent=2) + "\n")
    return summary


def add_enlarged_photo(
    report: Path, photo: Path, enlarged: Mapping[int, Path], *, usage: str
) -> None:
    """Show a crop of a photo enlarged beyond its own size, bicubic beside ours, in the report.

    Args:
        report: The HTML file of evaluate.py; a section goes before its footer, once.
        photo: The photo at its own size.
        enlarged: Our outputs by scale.
        usage: Time and memory of all commands, in words.
    """
    page = report.read_text()
    marker = '<section id="enlarged">'
    if marker in page:
        return
    figures = [
        figure
        for scale, path in enlarged.items()
        for figure in _pair_of_figures(photo, path, scale)
    ]
    section = (
        f"{marker}\n  <h2>Beyond the original: {html.escape(photo.stem)}, enlarged</h2>\n"
        f'  <div class="tiles">{"".join(figures)}</div>\n'
        f'  <p class="note">{html.escape(usage)}</p>\n</section>\n'
    )
    report.write_text(page.replace("<footer>", section + "<footer>", 1))


def add_commands(report: Path, ledger: Ledger, *, teacher: str) -> None:
    """Add the teacher, the commands and their times to the report.

    Args:
        report: The HTML file of evaluate.py; a section goes before its footer, once.
        teacher: In words, where it comes from.
    """
    page = report.read_text()
    marker = '<section id="commands">'
    if marker in page:
        return
    rows = "".join(
        f"<tr><td><code>{html.escape(' '.join(entry.command))}</code></td>"
        f"<td>{entry.seconds:.0f} s</td></tr>"
        for entry in ledger.entries
    )
    section = (
        f"{marker}\n  <h2>What was done</h2>\n"
        f'  <p class="note">{html.escape(teacher)}</p>\n  <table>{rows}</table>\n</section>\n'
    )
    report.write_text(page.replace("<footer>", section + "<footer>", 1))


def _pair_of_figures(photo: Path, path: Path, scale: int) -> list[str]:
    """Return the same crop of the photo, enlarged by bicubic and by the student."""
    with Image.open(photo) as image:
        left, top = (image.width - CROP_PX) // 2, (image.height - CROP_PX) // 2
        small = image.convert("RGB").crop((left, top, left + CROP_PX, top + CROP_PX))
    side = CROP_PX * scale
    bicubic = small.resize((side, side), Image.Resampling.BICUBIC)
    with Image.open(path) as image:
        box = (left * scale, top * scale, left * scale + side, top * scale + side)
        ours = image.convert("RGB").crop(box)
    return [_figure(bicubic, f"bicubic ×{scale}"), _figure(ours, f"student, four steps ×{scale}")]


def _figure(image: Image.Image, caption: str) -> str:
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<figure><img src="{uri}" alt="{caption}" loading="lazy" style="width: {image.width}px">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
