r"""The numbers of docs/results.md: bicubic, a teacher and its students on sets of photos.

    python -m benchmarks.proof --teacher mini_x2_teacher --students mini_x2 exports/flash_1 \
        --set Set5=~/benchmarks/Set5/x2 --set Set14=~/benchmarks/Set14/x2 --set photos=~/photos

A model is a folder, or the name of one that comes with the package. A set is a folder of NAME_HR.*
beside NAME_LR.*, or of photos, which are reduced bicubically. One command writes one section of
docs/results.json, x2 for pairs of ×2, and keeps the others; a study of several students with equal
numbers of steps has a section and names of its own:

    python -m benchmarks.proof --section critic --teacher mini_x2_teacher --teacher-steps 100 \
        --students shipped=mini_x2 without_features=exports/without_features --set …

No picture is written. Minutes on an H200 with a hundred steps of the teacher, hours on a CPU.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ksr_distill import __version__
from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.benchmark_images import Pair, common_scale, find_images, load_pair
from ksr_distill.evaluation.measure import measure
from ksr_distill.evaluation.model_folders import read_index
from ksr_distill.evaluation.upscalers import (
    ModelSpec,
    Upscaled,
    Upscaler,
    build_baseline,
    build_upscalers,
)
from ksr_distill.inference.model_folders.bundled import find_model
from ksr_distill.inference.model_folders.loading import pick_device
from ksr_distill.levels import from_levels, round_to_8_bit
from ksr_distill.randomness import Stream, generator_for

METRICS = (
    "psnr_y",
    "ssim_y",
    "top_octave_power_ratio",
    "swd",
    "lowres_consistency_psnr",
    "checkerboard_peak",
    "colour_mean_drift",
)
SEVERAL_SEEDS_UP_TO_STEPS = 8
"""A teacher's hundred steps are drawn once: they take most of the time, and vary little."""

Means = dict[str, float]


def model_specs(
    teachers: Sequence[str],
    students: Sequence[str],
    *,
    ddim_steps: Sequence[int],
    dpm_steps: Sequence[int] = (),
) -> list[ModelSpec]:
    """Return what is compared: teacher_1, teacher_5, …, teacher_dpm_5, …, student_4, ….

    Args:
        teachers: Models, or NAME=MODEL.
        students: Likewise; without a name, they are called by the number of their steps.
        dpm_steps: Of DPM-Solver++, the released sampler; the others are DDIM's.
    """
    specs = []
    for teacher in teachers:
        name, path = named(teacher, "teacher")
        folder = find_model(path)
        specs += [ModelSpec(f"{name}_{n}", folder, "ddim", n) for n in ddim_steps]
        specs += [ModelSpec(f"{name}_dpm_{n}", folder, "dpm", n) for n in dpm_steps]
    for student in students:
        name, path = named(student, None)
        folder = find_model(path)
        count = len(read_index(folder).get("student_timesteps", ()))
        specs.append(ModelSpec(name or f"student_{count}", folder))
    return specs


def named(text: str, default: str | None) -> tuple[str | None, str]:
    """Split NAME=FOLDER, with the user's ~ in the folder."""
    name, separator, path = text.rpartition("=")
    return (name if separator else default), str(Path(path).expanduser())


def load_set(folder: Path, scale: int, *, photo_crop_px: int | None = None) -> list[Pair]:
    """Return a benchmark's pairs, made by the bicubic recipe where there are photos alone.

    Args:
        photo_crop_px: Side of the centre crop that is left of each photo; null leaves all of it.
    """
    images = find_images(folder)
    found = common_scale(images)
    if found not in (None, scale):
        raise ValueError(f"{folder} holds pairs of ×{found}; give pairs of ×{scale}, or --scale")
    degradation = BicubicDegradation(scale)
    pairs = [
        load_pair(image, scale=scale, degradation=degradation, generator=generator_for(0))
        for image in images
    ]
    if found is not None or photo_crop_px is None:
        return pairs
    return [centre_of(pair, photo_crop_px, scale) for pair in pairs]


def centre_of(pair: Pair, side: int, scale: int) -> Pair:
    """Return the centre of a photo, and the centre of its lowres."""
    if pair.hires is None:
        return pair
    top, left = ((length - side) // 2 // scale * scale for length in pair.hires.shape[-2:])
    small, small_top, small_left = side // scale, top // scale, left // scale
    return Pair(
        pair.lowres[..., small_top : small_top + small, small_left : small_left + small],
        pair.hires[..., top : top + side, left : left + side],
    )


def measure_model(
    upscaler: Upscaler, pairs: Sequence[Pair], *, scale: int, device: torch.device, seeds: int
) -> dict[str, Any]:
    """Return the means over a set, their spread over seeds, and the means after each step."""
    steps = upscaler.num_inference_steps
    draws = seeds if steps is not None and steps <= SEVERAL_SEEDS_UP_TO_STEPS else 1
    by_seed: list[Means] = []
    peaks: list[float] = []
    by_step: dict[int, list[Means]] = {}
    for seed in range(draws):
        rows = []
        for number, pair in enumerate(pairs):
            generator = generator_for(seed, Stream.INFERENCE, number)
            upscaled = upscaler(pair.lowres.to(device), generator=generator)
            rows.append(values(upscaled.hires, pair, number, scale, device))
            if seed == 0:
                for step, estimate in estimates(upscaled):
                    found = values(estimate, pair, number, scale, device)
                    by_step.setdefault(step, []).append(found)
        by_seed.append(means(rows))
        peaks += [row["checkerboard_peak"] for row in rows]
    result: dict[str, Any] = {"num_inference_steps": steps, **means(by_seed)}
    result["worst_checkerboard_peak"] = max(peaks)
    if draws > 1:
        result["seed_spread"] = {
            key: statistics.stdev(one[key] for one in by_seed) for key in METRICS
        }
    if by_step:
        result["after_step"] = {step: means(found) for step, found in sorted(by_step.items())}
    return result


def estimates(upscaled: Upscaled) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (step, pred_x_0 in [-1, 1]) of the recorded estimates."""
    for step, image in upscaled.estimates:
        yield step, from_levels(image)


def values(image: torch.Tensor, pair: Pair, number: int, scale: int, device: torch.device) -> Means:
    """Return the metrics of one output, rounded as in a file."""
    if pair.hires is None:
        raise ValueError("a set without originals cannot be measured; give photos or pairs")
    saved = round_to_8_bit(image.to(device).float())
    measured = measure(
        saved, pair.hires.to(device), scale=scale, border_px=scale, seed=number, lpips=None
    )
    return {key: float(measured[key] or 0.0) for key in METRICS}


def means(rows: Sequence[Mapping[str, float]]) -> Means:
    """Return the mean of each metric."""
    return {key: statistics.fmean(row[key] for row in rows) for key in METRICS}


def facts(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the settings, software and hardware of the measurement."""
    asked = ["git", "rev-parse", "HEAD"]
    commit = (
        subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if shutil.which("git")
        else ""
    )
    return {
        "command": shlex.join(["python", "-m", "benchmarks.proof", *sys.argv[1:]]),
        "scale": options.scale,
        "seeds": options.seeds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "software": f"ksr_distill {__version__}, torch {torch.__version__}",
        "commit": commit or None,
    }


def record(path: Path, section: str, document: Mapping[str, Any]) -> None:
    """Write one section of the file of results; the others stay."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[section] = document
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Return the options: the models and the sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", help="of the file; x2 for --scale 2")
    parser.add_argument("--teacher", nargs="*", default=[], help="MODEL or NAME=MODEL")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[1, 5, 100], help="DDIM")
    parser.add_argument(
        "--teacher-dpm-steps", type=int, nargs="*", default=[5, 100], help="DPM-Solver++ (2M)"
    )
    parser.add_argument("--students", nargs="*", default=[], help="MODEL or NAME=MODEL")
    parser.add_argument("--set", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--photo-crop-px", type=int, help="centre of each photo; not of pairs")
    parser.add_argument("--seeds", type=int, default=3, help="of students and few-step teachers")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, default=Path("docs/results.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write the section."""
    options = parse_options()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    device = pick_device(options.device)
    specs = model_specs(
        options.teacher,
        options.students,
        ddim_steps=options.teacher_steps,
        dpm_steps=options.teacher_dpm_steps,
    )
    upscalers = {"bicubic": build_baseline("bicubic", scale=options.scale)}
    upscalers |= build_upscalers(specs, scale=options.scale, device=device, half=False)
    sets: dict[str, Any] = {}
    print("| set | model | " + " | ".join(METRICS) + " | seconds |")
    for text in options.set:
        name, path = named(text, None)
        pairs = load_set(Path(path), options.scale, photo_crop_px=options.photo_crop_px)
        models = {}
        for model, upscaler in upscalers.items():
            begin = time.perf_counter()
            models[model] = measure_model(
                upscaler, pairs, scale=options.scale, device=device, seeds=options.seeds
            )
            cells = " | ".join(f"{models[model][key]:.3f}" for key in METRICS)
            print(f"| {name} | {model} | {cells} | {time.perf_counter() - begin:.1f} |", flush=True)
        sets[name or Path(path).name] = {"num_images": len(pairs), "models": models}
        document = {"settings": facts(options, device), "sets": sets}
        record(options.json, options.section or f"x{options.scale}", document)
    print(options.json.resolve())


if __name__ == "__main__":
    main()
