r"""The pictures of docs/results.md, drawn from photos of the scikit-image wheel.

    python -m benchmarks.proof_pictures --teacher mini_x2_teacher --students mini_x2 \
        --curves teacher=outputs/ksr_teacher_mini/metrics.csv

No model was trained on these photos, and they may be shown. Some minutes on two CPU cores.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import diffusers
import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ksr_distill.data.sample_photos import SamplePhoto, locate
from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.benchmark_images import as_picture, read_image
from ksr_distill.evaluation.figures import ACCENTS, STYLE, read_curves
from ksr_distill.evaluation.upscalers import ModelSpec, Upscaler, build_baseline, build_upscalers
from ksr_distill.inference.bundled import find_model
from ksr_distill.inference.loading import load_pipeline
from ksr_distill.randomness import generator_for

CPU = torch.device("cpu")
MARGIN_PX, LABEL_PX, CONTEXT_PX = 6, 22, 32
WEBP = {"format": "WEBP", "quality": 92, "method": 6}
STRIP_SOURCE_PX, STRIP_SHOWN_PX = 64, 256
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
    """Return a place of a photo in [-1, 1], with some of its surroundings."""
    suffix = "jpg" if place.photo == "rocket" else "png"
    whole = read_image(locate(SamplePhoto("skimage", f"data/{place.photo}.{suffix}")))
    top, left = max(0, place.top - context_px), max(0, place.left - context_px)
    bottom, right = (first + place.side + context_px for first in (place.top, place.left))
    part = whole[..., top:bottom, left:right]
    height, width = (side // 4 * 4 for side in part.shape[-2:])
    return part[..., :height, :width].contiguous()


def compare(place: Place, upscalers: Mapping[str, Upscaler]) -> list[tuple[str, Image.Image]]:
    """Return the place as each model makes it from its half, and the original."""
    hires = original(place, context_px=CONTEXT_PX)
    lowres = BicubicDegradation(2)(hires, generator=generator_for(0))
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


def strip(folder: Path) -> list[list[tuple[str, Image.Image]]]:
    """Return a row of bicubic and one of the student: ×2, ×4, ×8, ×16 of ever smaller parts.

    The whole source is enlarged each time, and its middle shown at one size.
    """
    source = as_picture(original(STRIP))
    pipeline = load_pipeline(folder, device=CPU)
    rows: list[list[tuple[str, Image.Image]]] = [[], []]
    for scale in (2, 4, 8, 16):
        side = STRIP_SOURCE_PX * scale
        generator = torch.Generator().manual_seed(0)
        ours = pipeline(source, scale=scale, generator=generator).images[0]
        simple = source.resize((side, side), Image.Resampling.BICUBIC)
        for row, name, image in zip(rows, ("bicubic", "student"), (simple, ours), strict=True):
            row.append((f"{name} x{scale}", middle(image)))
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
                    axes.plot(*zip(*one[key], strict=True), color=colour, label=run, linewidth=1.2)
            axes.set_title(key, fontsize=9, loc="left")
            axes.set_xlabel("updates")
            axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    print(path, f"{path.stat().st_size / 1e3:.0f} kB", flush=True)


def models_of(teacher: str | None, steps: Sequence[int], students: Sequence[str]) -> dict:
    """Return bicubic, the teacher in so many steps, and the students, by their labels."""
    specs = [] if teacher is None else [
        ModelSpec(f"teacher, {n} step{'s' * (n > 1)}", find_model(teacher), "ddim", n)
        for n in steps
    ]  # fmt: skip
    for student in students:
        folder = find_model(student)
        count = len(json.loads((folder / "model_index.json").read_text())["student_timesteps"])
        specs.append(ModelSpec(f"student, {count} step{'s' * (count > 1)}", folder))
    upscalers = {"bicubic": build_baseline("bicubic", scale=2)}
    return upscalers | build_upscalers(specs, scale=2, device=CPU, half=False)


def main() -> None:
    """Draw what the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="a folder, or the name of a model of the package")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[1, 100])
    parser.add_argument("--students", nargs="*", default=[])
    parser.add_argument("--curves", nargs="*", default=[], metavar="RUN=FILE")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()

    diffusers.utils.logging.disable_progress_bar()
    if options.teacher or options.students:
        models = models_of(options.teacher, options.teacher_steps, options.students)
        write_sheet([compare(place, models) for place in CROPS], options.out / "crops.webp")
        write_sheet([compare(place, models) for place in DARK], options.out / "dark.webp")
    if options.students:
        write_sheet(strip(find_model(options.students[0])), options.out / "strip.webp")
    if options.curves:
        pairs = (text.partition("=") for text in options.curves)
        runs = {name: Path(file) for name, _, file in pairs}
        write_curves(runs, options.out / "curves.png")


if __name__ == "__main__":
    main()
