"""How long pictures take with a given model, and how close they are to float32.

    python -m benchmarks.folder --pictures photos        # on a GPU: with the kernels and without
    python -m benchmarks.folder --tiny                   # seconds on a CPU

First the networks alone: one picture repeatedly in this process. Then folders, each by a process of
``ksr upscale``, from command to last file. Their pictures have different sizes, so that the cost of
whatever is measured or compiled once for each shape is included.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from benchmarks.inference import photo_like
from benchmarks.measuring import RESULTS, peak_gb, run_command, write_results
from ksr_distill.inference.model_folders.bundled import default_student, find_model
from ksr_distill.inference.model_folders.loading import load_pipeline, pick_device, runs_fast

WAYS = {"float32": ["--fp32"], "plain modules": ["--no-fast"], "fast": ["--fast"]}
AGAIN = 4


def make_pictures(folder: Path, sides: list[int]) -> Path:
    """Write square pictures with finer and finer detail, one of each side."""
    folder.mkdir()
    for seed, side in enumerate(sides):
        pixels = (photo_like(side, seed=seed).permute(1, 2, 0) * 255).round().byte().numpy()
        PIL.Image.fromarray(pixels).save(folder / f"{seed:02}_{side}.png")
    return folder


def psnr(picture: Path, reference: Path) -> float:
    """Return the peak signal-to-noise ratio of two files' 8-bit pixels, in dB, 99 at most."""
    a, b = (np.asarray(PIL.Image.open(path).convert("RGB"), float) for path in (picture, reference))
    return float(-10 * np.log10(max(float(np.mean((a - b) ** 2)) / 255**2, 1e-9)))


def compare(folder: Path, reference: Path) -> dict[str, float]:
    """Return the mean and the lowest PSNR of a folder's pictures."""
    names = sorted(path.relative_to(reference) for path in reference.rglob("*.png"))
    decibels = [psnr(folder / name, reference / name) for name in names]
    return {"psnr_db": statistics.mean(decibels), "lowest_psnr_db": min(decibels)}


def in_one_process(model: Path, way: str, device: torch.device, *, side: int) -> dict[str, Any]:
    """Return the seconds of a process's first picture of a size and of the next ones, doubled."""
    pipeline = load_pipeline(model, device=device, fp32=way == "float32", fast=way == "fast")
    picture = photo_like(side, seed=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def seconds() -> float:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)  # the result lies on the CPU: it is finished
        pipeline(picture, 2, generator=generator, output_type="pt", tile_px=2 * side)
        return time.perf_counter() - start

    first = seconds()
    later = statistics.median(seconds() for _ in range(AGAIN))
    return {"way": way, "side": side, "first_seconds": round(first, 3),
            "seconds": round(later, 3), "peak_gb": round(peak_gb(device), 2)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="a folder; by default 16 sizes are drawn")
    parser.add_argument("--model", help="as ksr upscale takes it; by default the shipped student")
    parser.add_argument("--tiny", action="store_true", help="three small pictures")
    parser.add_argument("--starts", type=int, default=2, help="of each way")
    parser.add_argument("--json", type=Path, default=RESULTS / "folder.json")
    options = parser.parse_args(arguments)
    device = pick_device(None)
    ways = {way: flags for way, flags in WAYS.items() if way != "fast" or runs_fast(device)}
    model = find_model(options.model) if options.model else default_student(2)
    rows: list[dict[str, Any]] = []
    print("| way | one picture | first, s | next, s | peak, GB |")
    print("| --- | --- | --- | --- | --- |")
    alone = []
    for side in (24,) if options.tiny else (512, 1024):
        for way in ways:
            row = in_one_process(model, way, device, side=side)
            alone.append(row)
            print(f"| {way} | {side}² | {row['first_seconds']} | {row['seconds']} "
                  f"| {row['peak_gb']} |", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        sides = [24, 32, 40] if options.tiny else list(range(384, 1152, 48))
        pictures = options.pictures or make_pictures(Path(scratch, "drawn"), sides)
        count = sum(path.is_file() for path in pictures.rglob("*"))
        print("| way | start | seconds | a picture | dB from float32 (lowest) |")
        print("| --- | --- | --- | --- | --- |")
        for start in range(options.starts):
            for way, flags in ways.items():
                out = Path(scratch, f"{way} {start}")
                cost = run_command(
                    [sys.executable, "-c", "from ksr_distill.cli import main; main()", "upscale",
                     str(pictures), "-o", str(out), "--format", "png", "--model", str(model),
                     *flags]
                )  # fmt: skip
                row = {"way": way, "start": start, "seconds": round(cost.seconds, 2),
                       "pictures": count, "peak_mb": round(cost.peak_mb),
                       **compare(out, Path(scratch, "float32 0"))}  # fmt: skip
                rows.append(row)
                print(f"| {way} | {start + 1} | {row['seconds']} | {cost.seconds / count:.2f} "
                      f"| {row['psnr_db']:.1f} ({row['lowest_psnr_db']:.1f}) |",
                      flush=True)  # fmt: skip
                write_results(options.json, {"alone": alone, "rows": rows})


if __name__ == "__main__":
    main()
