r"""Draws the pictures of docs/results.md, from photos of the scikit-image wheel.

    python -m benchmarks.proof_pictures --teacher mini_x2_teacher --students mini_x2 \
        --strip mini_x2 mini_x4 --curves teacher teacher=outputs/ksr_teacher_mini/metrics.csv
    python -m benchmarks.proof_pictures --scale 4 --teacher exports/teacher_x4 --students mini_x4
    python -m benchmarks.proof_pictures --ablations benchmarks/results/ablations.json

No shipped model was trained on these photos, and their licences allow showing them. Some minutes on
two CPU cores.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from benchmarks.proof import model_specs
from benchmarks.proof_page import in_words
from ksr_distill.data.sample_photos import SamplePhoto, locate
from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.benchmark_images import as_picture, read_image
from ksr_distill.evaluation.curves import read_curves
from ksr_distill.evaluation.figures import ACCENTS, STYLE
from ksr_distill.evaluation.upscalers import Upscaler, build_baseline, build_upscalers
from ksr_distill.inference.model_folders.bundled import find_model
from ksr_distill.inference.model_folders.loading import load_pipeline
from ksr_distill.randomness import generator_for

CPU = torch.device("cpu")
MARGIN_PX, LABEL_PX, CONTEXT_PX = 6, 22, 32
WEBP = {"format": "WEBP", "quality": 92, "method": 6}
STRIP_SOURCE_PX, STRIP_SHOWN_PX = 64, 256
STRIP_SCALES = (2, 4, 8, 16)
LINE = {"linewidth": 1.2, "marker": "o", "markersize": 2}
BICUBIC = Image.Resampling.BICUBIC
CURVES = (
    "val/psnr_y",
    "val/top_octave_power_ratio",
    "val/swd",
    "val/checkerboard_peak",
    "train/wasserstein_gap",
    "health/paired_auc_head_0",
)


class Place(NamedTuple):
    """A square of a sample photo.

    Attributes:
        left: Of the original, px; even, as top and side are.
        zoom: How large a pixel is shown.
    """

    photo: str
    left: int
    top: int
    side: int
    zoom: int


CROPS = (
    Place("chelsea", 140, 80, 72, 3),
    Place("chelsea", 240, 210, 72, 3),
    Place("astronaut", 176, 84, 72, 3),
    Place("motorcycle_left", 384, 244, 72, 3),
)
# Flat and dark, four times as large: where adversarial students grow coloured patterns.
DARK = (
    Place("coffee", 20, 20, 52, 4),
    Place("rocket", 40, 60, 52, 4),
    Place("chelsea", 166, 96, 52, 4),
)
STRIP = Place("chelsea", 150, 96, STRIP_SOURCE_PX, 1)


def original(place: Place, *, context_px: int = 0) -> torch.Tensor:
    """Return a crop of a photo in [-1, 1], with some of its surroundings."""
    suffix = "jpg" if place.photo == "rocket" else "png"
    whole = read_image(locate(SamplePhoto("skimage", f"data/{place.photo}.{suffix}")))
    top, left = max(0, place.top - context_px), max(0, place.left - context_px)
    bottom, right = (first + place.side + context_px for first in (place.top, place.left))
    part = whole[..., top:bottom, left:right]
    height, width = (side // 4 * 4 for side in part.shape[-2:])
    return part[..., :height, :width].contiguous()


def compare(
    place: Place, upscalers: Mapping[str, Upscaler], scale: int = 2
) -> list[tuple[str, Image.Image]]:
    """Return the crop as each model restores it from a half or a quarter, and the original."""
    hires = original(place, context_px=CONTEXT_PX)
    lowres = BicubicDegradation(scale)(hires, generator=generator_for(0))
    top, left = min(CONTEXT_PX, place.top), min(CONTEXT_PX, place.left)

    def shown(image: torch.Tensor) -> Image.Image:
        part = image[..., top : top + place.side, left : left + place.side]
        side = place.side * place.zoom
        return as_picture(part).resize((side, side), Image.Resampling.NEAREST)

    made = [
        (name, shown(upscaler(lowres, generator=generator_for(0)).hires))
        for name, upscaler in upscalers.items()
    ]
    return [*made, ("original", shown(hires))]


def strip(folders: Mapping[str, Path]) -> list[list[tuple[str, Image.Image]]]:
    """Return a row of bicubic and one of each student: ×2, ×4, ×8, ×16 of ever smaller parts.

    The whole source is enlarged each time, in passes of the student's own scale, and its middle
    shown at one size.
    """
    source = as_picture(original(STRIP))
    rows = [
        [
            (f"bicubic x{scale}", middle(source.resize([STRIP_SOURCE_PX * scale] * 2, BICUBIC)))
            for scale in STRIP_SCALES
        ]
    ]
    for name, folder in folders.items():
        pipeline = load_pipeline(folder, device=CPU)
        row = []
        for scale in STRIP_SCALES:
            generator = torch.Generator().manual_seed(0)
            ours = pipeline(source, scale=scale, generator=generator).images[0]
            row.append((f"{name} x{scale}", middle(ours)))
        rows.append(row)
    return rows


def middle(image: Image.Image) -> Image.Image:
    """Return the middle of a picture, or a small picture with each pixel as a square."""
    size = (STRIP_SHOWN_PX, STRIP_SHOWN_PX)
    if image.width <= STRIP_SHOWN_PX:
        return image.resize(size, Image.Resampling.NEAREST)
    left = (image.width - STRIP_SHOWN_PX) // 2
    return image.crop((left, left, left + STRIP_SHOWN_PX, left + STRIP_SHOWN_PX))


def write_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], path: Path) -> None:
    """Write rows of labelled pictures of one size."""
    width, height = rows[0][0][1].size
    columns = max(len(row) for row in rows)
    size = (columns * (width + MARGIN_PX), len(rows) * (height + LABEL_PX + MARGIN_PX))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (label, image) in enumerate(row):
            left, top = x * (width + MARGIN_PX), y * (height + LABEL_PX + MARGIN_PX)
            draw.text((left, top + 3), label, fill="black", font=ImageFont.load_default(13))
            sheet.paste(image, (left, top + LABEL_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, **WEBP)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


def write_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Write a plot for each metric that a run has recorded, all in one picture."""
    curves = {run: read_curves(file) for run, file in runs.items()}
    found = [key for key in CURVES if any(key in one for one in curves.values())]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.6 * -(-len(found) // 3)), dpi=100, layout="constrained")
        for number, key in enumerate(found):
            axes = figure.add_subplot(-(-len(found) // 3), 3, number + 1)
            for colour, (run, one) in zip(ACCENTS * 3, curves.items(), strict=False):
                if key in one:
                    axes.plot(*zip(*one[key], strict=True), color=colour, label=run, **LINE)
            axes.set_title(key, fontsize=9, loc="left")
            axes.set_xlabel("updates")
            axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    print(path, f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


def write_frontier(rows: Mapping[str, Any], path: Path) -> None:
    """Plot the final metrics of each change, and the course of the longest run."""
    ended = {name: row["validation"] for name, row in rows.items() if "validation" in row}
    longest = max((row for row in rows.values() if "curves" in row), key=lambda r: r["updates"])
    way = [[value for _, value in longest["curves"][key]] for key in ("val/psnr_y", "val/swd")]
    with mpl.rc_context(STYLE):
        height = max(5.4, 0.7 + 0.18 * len(ended))  # the legend has a line of .18 inches a row
        figure = Figure(figsize=(9.6, height), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        label = f"every 250 of {longest['updates']} updates"
        axes.plot(*way, color=ACCENTS[4], label=label, **LINE)
        for number, (name, one) in enumerate(ended.items(), 1):
            place = one["psnr_y"], one["swd"]
            colour = ACCENTS[1 if name.startswith("base") else 0]
            axes.plot(*place, "o", color=colour, markersize=4, label=f"{number}  {name}")
            axes.annotate(str(number), place, (3, 3), textcoords="offset points", fontsize=8)
        axes.set_xlabel("PSNR-Y, dB: to the right, more faithful")
        axes.set_ylabel("SWD × 1000: down, more like the originals")
        figure.legend(frameon=False, loc="outside right upper", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    print(path, f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


def models_of(
    teachers: Sequence[str], steps: Sequence[int], students: Sequence[str], scale: int
) -> dict[str, Upscaler]:
    """Return bicubic, the teacher in so many DDIM steps, and the students, by their labels."""
    specs = [
        replace(spec, name=in_words(spec.name))
        for spec in model_specs(teachers, students, ddim_steps=steps)
    ]
    upscalers = {"bicubic": build_baseline("bicubic", scale=scale)}
    return upscalers | build_upscalers(specs, scale=scale, device=CPU, half=False)


def parse_options() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", nargs="*", default=[], help="MODEL or NAME=MODEL")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[1, 100])
    parser.add_argument("--students", nargs="*", default=[], help="MODEL or NAME=MODEL")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--strip", nargs="*", default=[], metavar="STUDENT")
    parser.add_argument(
        "--curves", nargs="+", action="append", default=[], metavar=("NAME", "RUN=FILE"),
        help="a figure's name, and the runs in it; repeatable",
    )  # fmt: skip
    parser.add_argument("--ablations", type=Path, metavar="FILE", help="rows of the study")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args()


def main() -> None:
    """Draw what the options name."""
    options = parse_options()
    diffusers.utils.logging.disable_progress_bar()
    if options.teacher or options.students:
        scale, end = options.scale, f"x{options.scale}.webp"
        models = models_of(options.teacher, options.teacher_steps, options.students, scale)
        for name, places in (("crops", CROPS), ("dark", DARK)):
            sheet = [compare(place, models, scale) for place in places]
            write_sheet(sheet, options.out / f"{name}_{end}")
    if options.strip:
        folders = {Path(name).name: find_model(name) for name in options.strip}
        write_sheet(strip(folders), options.out / "strip.webp")
    for name, *texts in options.curves:
        pairs = (text.partition("=") for text in texts)
        runs = {run: Path(file) for run, _, file in pairs}
        write_curves(runs, options.out / f"{name}.png")
    if options.ablations:
        rows = json.loads(options.ablations.read_text(encoding="utf-8"))["rows"]
        write_frontier(rows, options.out / "ablations.png")


if __name__ == "__main__":
    main()
