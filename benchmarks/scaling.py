"""The speed of a second device, and how long the devices wait for data.

    python -m benchmarks.scaling            # one and two GPUs: train.py +experiment=ksr_flash
    python -m benchmarks.scaling --teacher  # a teacher launched by Python, under DDP
    python -m benchmarks.scaling --tiny     # one and two processes of a CPU (gloo)

Each number of processes is a run of train.py under torchrun on shards of pictures, with the same
batch for each process; speeds are those that the run itself logs, medians of its windows. The
largest number of processes comes first, so that the others find its compiled code. Afterwards a run
of two processes is stopped, continued by the same command, and its weights compared between the
ranks. Results are written as they come, so that a stopped benchmark keeps them.
"""

import argparse
import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from benchmarks.loader import Case, make_pictures, pack
from benchmarks.measuring import RESULTS, phase, write_results
from benchmarks.modules import STEADY, composed, write_random_teacher

QUIET = ("trainer.val_check_interval=1.0", "+trainer.enable_progress_bar=false",
         "+trainer.enable_model_summary=false", "callbacks.speed.count_flops=false",
         "validate_every=100000", "logger=default")  # fmt: skip
SIZES = {
    "full": ("+experiment=ksr_flash", *STEADY),
    # The highest load on the links: all gradients of the full-size network, the least arithmetic.
    "teacher": ("module=teacher", "loss=denoising", "model=ksr_x2", "model.dropout=0.0",
             "data.crop_px=256", "compile_networks=blocks"),
    "mini": ("+experiment=ksr_teacher_mini",),
    "tiny": ("module=teacher", "loss=denoising", "model=tiny", "data.crop_px=32", "trainer=cpu",
             "compile_networks=false", "data.num_workers=1"),
}  # fmt: skip
GAME = ("model=tiny", "critic=tiny", "compile_networks=false", "data.crop_px=64",
        "data.num_workers=1", *STEADY)  # fmt: skip


class Ranks(Callback):
    """Records at the end whether all ranks hold the same weights, bit for bit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare checksums of everything that training changes."""
        sha = hashlib.sha256()
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad or "_ema." in name:
                sha.update(parameter.detach().cpu().numpy().tobytes())
        digests = [sha.hexdigest()]
        if dist.is_initialized():
            digests = [""] * dist.get_world_size()
            dist.all_gather_object(digests, sha.hexdigest())
        if trainer.is_global_zero:
            state = {"equal": len(set(digests)) == 1, "ranks": len(digests), "digest": digests[0],
                    "backend": dist.get_backend() if dist.is_initialized() else None,
                    "updates": getattr(pl_module, "update", 0)}  # fmt: skip
            self.path.write_text(json.dumps(state))


def work(overrides: list[str], folder: Path, *, saves: bool) -> None:
    """Train as train.py does, in one of torchrun's processes.

    Args:
        overrides: Of conf/train.yaml.
        folder: The run's.
        saves: Whether the run writes checkpoints, which would dominate a short one.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train  # noqa: PLC0415 - the script; only a worker needs it
    from ksr_distill.training.checkpoints import RunCheckpoint  # noqa: PLC0415
    from ksr_distill.training.preemption import PreemptionGuard  # noqa: PLC0415

    make_trainer = train.make_trainer

    def make_watched_trainer(config: dict[str, Any]) -> pl.Trainer:
        trainer: Any = make_trainer(config)
        if not saves:
            saving = (RunCheckpoint, PreemptionGuard)
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, saving)]
        trainer.callbacks.append(Ranks(folder / "ranks.json"))
        return trainer

    train.make_trainer = make_watched_trainer
    train.train(composed(*overrides, f"run_dir={folder}"), is_sweep=False)


def run(overrides: list[str], folder: Path, processes: int, *, saves: bool = False) -> Path:
    """Run train.py's training in processes; return its folder.

    Raises:
        SystemExit: If it failed; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*overrides, f"trainer.devices={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", "-m", "benchmarks.scaling",
               "--work", str(folder), *(["--saves"] if saves else []),
               "--overrides", *arguments]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    began = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                speeds = logged(folder, "speed/updates_per_s")[-1:]
                print(f"  {time.monotonic() - began:4.0f} s, updates/s: {speeds}", flush=True)
    if process.returncode:
        tail = (folder / "log.txt").read_text()[-9000:]
        raise SystemExit(f"error: training on {processes} processes failed:\n{tail}")
    return folder


def logged(folder: Path, metric: str) -> list[float]:
    """Return a run's figures of one name, windows of compilation left out."""
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open() as file:
        rows = [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric]
    return rows[len(rows) // 2 :]


def speed_of(folder: Path, processes: int) -> dict[str, float]:
    """Return the speeds that a run logged."""
    waits = [max(logged(folder, f"rank/{r}/loader_wait_share")) for r in range(processes)]
    return {
        "processes": processes,
        "updates_per_s": statistics.median(logged(folder, "speed/updates_per_s")),
        "images_per_s": statistics.median(logged(folder, "speed/images_per_s")),
        "wait_share": max(waits),
        "memory_gb": max(max(logged(folder, f"rank/{r}/memory_gb")) for r in range(processes)),
    }


def measure_speed(
    options: argparse.Namespace,
    shards: str,
    folder: Path,
    keep: Callable[[list[dict[str, float]]], None],
) -> list[dict[str, float]]:
    """Return a row for each number of processes; hand them over as they come, too."""
    rows: list[dict[str, float]] = []
    also = list(options.also)
    if options.size == "full":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = composed("model=ksr_x2")["model"]
        teacher = write_random_teacher(folder / "teacher", model, device)
        also.append(f"teacher={teacher}")
    for processes in sorted(options.processes, reverse=True):
        overrides = [*SIZES[options.size], *QUIET, f"data.shards='{shards}'",
                     f"data.batch_size={options.batch * processes}",
                     f"num_updates={options.updates}",
                     f"log_every={max(1, options.updates // 8)}", *also]  # fmt: skip
        with phase(f"{processes} process(es)"):
            out = run(overrides, folder / f"speed{processes}", processes)
        row = speed_of(out, processes)
        row["equal_ranks"] = json.loads((out / "ranks.json").read_text())["equal"]
        rows.insert(0, row)
        print(json.dumps(row), flush=True)
        keep(rows)
    return rows


def summary_of(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the content of the results' file."""
    by_count = {row["processes"]: row for row in rows}
    summary = {"rows": rows, "wait_share": max(row["wait_share"] for row in rows)}
    if {1, 2} <= by_count.keys():
        summary["two_gpu_speedup"] = by_count[2]["images_per_s"] / by_count[1]["images_per_s"]
    return summary


def print_table(rows: Sequence[dict[str, float]]) -> None:
    """Print the rows as Markdown."""
    print("| processes | images/s | updates/s | waits for data | GB | ranks equal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r['processes']} | {r['images_per_s']:.1f} | {r['updates_per_s']:.2f} "
              f"| {r['wait_share']:.2%} | {r['memory_gb']:.1f} | {r['equal_ranks']} |")  # fmt: skip


def check_resume(shards: str, folder: Path, *, on_cpu: bool) -> dict[str, Any]:
    """Stop a distillation on two processes after 8 updates, continue to 12; return the outcome."""
    config = composed("model=tiny")
    teacher = write_random_teacher(folder / "teacher", config["model"])
    overrides = [*GAME, *QUIET, f"teacher={teacher}", f"data.shards='{shards}'", "log_every=4",
                 "data.batch_size=8", *(["trainer=cpu"] if on_cpu else [])]  # fmt: skip
    out = folder / "resumed"
    run([*overrides, "num_updates=8"], out, 2, saves=True)
    run([*overrides, "num_updates=12"], out, 2, saves=True)
    starts = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    state = json.loads((out / "ranks.json").read_text())
    return {
        "backend": state["backend"],
        "resumed_from": starts[-1]["from_update"],
        "ended_at": state["updates"],
        "equal_ranks": state["equal"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mini", dest="size", action="store_const", const="mini", default="full")
    parser.add_argument("--teacher", dest="size", action="store_const", const="teacher")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--updates", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16, help="of each process")
    parser.add_argument("--no-resume", action="store_true", help="speed only")
    parser.add_argument("--also", nargs="*", default=[], help="overrides of conf/train.yaml")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--saves", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.overrides, options.work, saves=options.saves)
        return

    began = time.perf_counter()
    name = "scaling" if options.size == "full" else f"scaling_{options.size}"
    path = options.json or RESULTS / f"{name}.json"
    results: dict[str, Any] = {"size": options.size, "batch_per_process": options.batch}

    def keep(rows: list[dict[str, float]]) -> None:
        results.update(summary_of(rows))
        write_results(path, results)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        make_pictures(folder / "photos", Case("scaling", "jpg", 320, 256, 128))
        shards = pack(folder / "photos", folder / "shards", None)
        rows = measure_speed(options, shards, folder, keep)
        print_table(rows)
        if not options.no_resume:
            on_cpu = options.size == "tiny" or not torch.cuda.is_available()
            with phase("two processes ended and continued"):
                results["resume"] = check_resume(shards, folder, on_cpu=on_cpu)
            print(json.dumps(results["resume"]), flush=True)
            keep(rows)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
