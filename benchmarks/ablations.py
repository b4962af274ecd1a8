r"""What each setting of the distillation does: one change at a time, at the same budget.

    python -m benchmarks.ablations --shards shards/train/train-000000.tar \
        --val-shards shards/val/train-000000.tar
    python -m benchmarks.ablations … --only base gamma_1   # the file's other rows stay
    python -m benchmarks.ablations … --set Set5=… --set Set14=…   # measures finished runs on them

benchmarks/ablations.yaml lists the changes. Each row is a run of train.py, several at once on a
device, and reports the run's last validation, whose pictures and noise are the same for all. An
interrupted run continues, and a finished one is only read. Rows are written as runs end.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import yaml

from benchmarks.measuring import RESULTS, today, write_results
from benchmarks.proof import load_set, measure_model, named
from ksr_distill.evaluation.benchmark_images import Pair
from ksr_distill.evaluation.curves import read_curves
from ksr_distill.evaluation.upscalers import ModelSpec, build_upscalers
from ksr_distill.export import pipeline_of, read_checkpoint
from ksr_distill.inference.model_folders.bundled import find_model
from ksr_distill.training.checkpoint_folder import last_good_checkpoint, update_of_file

CHANGES = Path(__file__).with_suffix(".yaml")
VALIDATION = (
    "val/psnr_y",
    "val/top_octave_power_ratio",
    "val/swd",
    "val/lowres_consistency_psnr",
    "val/checkerboard_peak",
)
GAME = ("train/wasserstein_gap", "health/paired_auc_head_0")
SHOWN = ("psnr_y", "top_octave_power_ratio", "swd")


class Run(NamedTuple):
    """A change of the config, and the device for its run."""

    name: str
    change: str
    overrides: tuple[str, ...]
    folder: Path


def read_changes() -> dict[str, Any]:
    """Return the file of changes: overrides of all runs, ``base``, and of each, ``rows``."""
    return yaml.safe_load(CHANGES.read_text(encoding="utf-8"))


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Return the selected changes in the order given; by default all, in the file's.

    Raises:
        SystemExit: If a row is asked for that the file does not have.
    """
    changes = read_changes()
    unknown = [name for name in options.only or () if name not in changes["rows"]]
    if unknown:
        raise SystemExit(
            f"error: --only {unknown[0]} is not in {CHANGES.name}; use {', '.join(changes['rows'])}"
        )
    common = ("+experiment=ksr_flash_mini", f"teacher={find_model(options.teacher)}",
              f"num_updates={options.updates}", f"data.shards={options.shards}",
              f"data.val_shards={options.val_shards}", f"validate_every={options.validate_every}",
              "callbacks.speed.count_flops=false", "+trainer.enable_progress_bar=false",
              *changes["base"].split(), *options.also)  # fmt: skip
    rows: dict[str, str] = changes["rows"]
    return [
        Run(name, rows[name], (*common, *rows[name].split(), f"name={name}"), options.folder / name)
        for name in options.only or rows
    ]


def train(run: Run, device: str | None) -> str | None:
    """Train to the end; return the last line of output if it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log_file = run.folder / "log.txt"
    command = [sys.executable, "train.py", *run.overrides, f"hydra.run.dir={run.folder}"]
    with log_file.open("w") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    return (log_file.read_text().splitlines() or ["no output"])[-1] if done.returncode else None


def trained(
    runs: Sequence[Run], devices: Sequence[str | None]
) -> Iterator[tuple[Run, float, str | None]]:
    """Yield (run, seconds, error) as runs end; there are as many at once as devices."""
    waiting: queue.Queue[Run] = queue.Queue()
    ended: queue.Queue[tuple[Run, float, str | None]] = queue.Queue()
    for run in runs:
        waiting.put(run)

    def work(device: str | None) -> None:
        while True:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            error = train(run, device)
            ended.put((run, time.monotonic() - began, error))

    for device in devices:
        threading.Thread(target=work, args=(device,), daemon=True).start()
    for _ in runs:
        yield ended.get()


def measured(
    run: Run, sets: Mapping[str, Sequence[Pair]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return a finished run's row: last validation, curves, and the critic's means at the end."""
    path = last_good_checkpoint(run.folder / "checkpoints")
    if path is None:
        return {"failed": "it left no checkpoint"}
    curves = read_curves(run.folder / "metrics.csv")
    ends = {name: curves[name][-max(1, len(curves[name]) // 4) :] for name in GAME}
    row: dict[str, Any] = {
        "updates": update_of_file(path),
        "validation": {name.removeprefix("val/"): curves[name][-1][1] for name in VALIDATION},
        "game": {name: statistics.fmean(v for _, v in points) for name, points in ends.items()},
        "curves": {name: curves[name] for name in VALIDATION},
    }
    if sets:
        row["sets"] = measured_on_sets(run, path, sets, options)
    return row


def measured_on_sets(
    run: Run, path: Path, sets: Mapping[str, Sequence[Pair]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return what benchmarks/proof.py measures of a run's student."""
    model = run.folder / "model"
    pipeline_of(read_checkpoint(path)).save_pretrained(model)
    device = torch.device(options.device)
    specs = [ModelSpec(run.name, model)]
    upscaler = build_upscalers(specs, scale=2, device=device, half=False)[run.name]
    return {
        name: measure_model(upscaler, pairs, scale=2, device=device, seeds=options.seeds)
        for name, pairs in sets.items()
    }


def with_row(rows: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows with a new one, in the order of the file of changes.

    A failure does not replace an earlier run's result.
    """
    if "failed" in row and name in rows:
        return dict(rows)
    order = list(read_changes()["rows"])
    known = [one for one in order if one in {*rows, name}]
    gone = [one for one in rows if one not in order]
    return {one: row if one == name else rows[one] for one in known + gone}


def heading(sets: Sequence[str]) -> str:
    """Return the table's first two lines."""
    titles = ["change", "updates", "PSNR-Y · top octave · SWD", *sets, "peak", "gap", "paired AUC"]
    return f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"


def line_of(name: str, row: Mapping[str, Any], sets: Sequence[str]) -> str:
    """Return a table's line."""
    if "failed" in row:
        return f"| {name} | failed: {row['failed']} |"
    gap, auc = (row["game"][key] for key in GAME)
    judged = [row["validation"], *(row["sets"][one] for one in sets)]
    cells = ["{:.2f} · {:.2f} · {:.1f}".format(*(one[key] for key in SHOWN)) for one in judged]
    peak = row["validation"]["checkerboard_peak"]
    figures = [f"{value:.2f}" for value in (peak, gap, auc)]
    return f"| {' | '.join([name, str(row['updates']), *cells, *figures])} |"


def parse_options() -> argparse.Namespace:
    """Return the options: the changes, their data, and the sets to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--val-shards", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--teacher", default="mini_x2_teacher")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--only", nargs="*", metavar="ROW")
    parser.add_argument("--also", nargs="*", default=[], help="overrides of every run")
    parser.add_argument("--gpus", nargs="*", help="their numbers; all by default")
    parser.add_argument("--at-once", type=int, default=3, help="runs on a device")
    parser.add_argument("--seeds", type=int, default=2, help="of the noise, when measuring")
    parser.add_argument("--folder", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--json", type=Path, default=RESULTS / "ablations.json")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus: list[str | None] = options.gpus or [str(i) for i in range(torch.cuda.device_count())]
    options.devices = (gpus or [None]) * options.at_once
    return options


def main() -> None:
    """Train, measure, print a line for each change, and write the rows."""
    options = parse_options()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    runs = runs_of(options)
    sets = {(name or Path(path).name): load_set(Path(path), 2) for name, path in
            (named(text, None) for text in options.set)}  # fmt: skip
    path: Path = options.json
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    print(heading(list(sets)))
    for run, seconds, error in trained(runs, options.devices):
        row: dict[str, Any] = {"change": run.change, "date": today(), "seconds": seconds}
        row |= {"failed": error} if error else measured(run, sets, options)
        results["rows"] = with_row(results["rows"], run.name, row)
        print(line_of(run.name, row, list(sets)), flush=True)
        write_results(path, results)


if __name__ == "__main__":
    main()
