"""The speed of an update, against the arithmetic it needs and against plain PyTorch.

    python -m benchmarks.training                 # full size: 16 crops of 256², 4 of 512²
    python -m benchmarks.training --mini          # the shipped small model's teacher and student
    python -m benchmarks.training --tiny          # seconds on a CPU
    python -m benchmarks.training --mini --profile
    python -m benchmarks.training --compile-only  # minutes; fills the compiler's cache
    python -m benchmarks.training --only 1 --add  # one case; the file's other rows stay
    python -m benchmarks.training --also compile_networks=networks

Cases run at the same time, on a device each if there are as many, and are measured one after the
other. Rows are written as they come, so that a stopped run keeps them.

``ours`` is what conf/train.yaml sets, with each kind of block compiled once and updates replayed as
CUDA graphs; ``eager`` is the same algorithm without either, in PyTorch's own memory format, and
``recomputing`` with activation checkpointing of the student.
TFLOP/s are those of convolutions and matrix products, counted in eager updates with the same
draws, over the time of an update; their share is of a large bf16 product's, the fastest that a case
of the run measured.
"""

import argparse
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import (
    RESULTS,
    Times,
    matmul_rate,
    peak_gb,
    phase,
    time_calls,
    wait_for,
    write_results,
)
from benchmarks.modules import (
    STEADY,
    build_module,
    composed,
    precision_of_training,
    random_batch,
    renew_optimizers,
    turns_of,
    write_random_teacher,
)
from benchmarks.profiling import print_profile
from ksr_distill.training.arithmetic import ArithmeticCounter
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.cuda_graphs import WARM_UPS
from ksr_distill.types import Batch

# Draws are a function of the update, so all rows have the same. In these four the student is rolled
# out once, three times, not at all, not at all: on average one forward pass; in a run it is 1.1.
FIRST_UPDATE, CALLS = 106, 4


class Case(NamedTuple):
    """A configuration whose updates are timed."""

    name: str
    overrides: tuple[str, ...]
    batch_size: int
    crop_px: int


class Row(NamedTuple):
    """One line of the table."""

    case: str
    what: str
    mode: str
    batch_size: int
    crop_px: int
    seconds: float
    host_seconds: float
    spread: float
    samples_per_s: float
    tflops: float
    share_of_matmul: float
    peak_gb: float
    matmul_tflops: float
    overrides: str


FULL = (
    "module=distillation",
    "model=ksr_x2",
    "compile_networks=blocks",
    "cuda_graphs=true",
    *STEADY,
)
TINY = ("model=tiny", "compile_networks=false")  # compiling on a CPU takes longer than a test may
CASES = {
    "full": (Case("full size", FULL, 16, 256), Case("full size", FULL, 4, 512)),
    "mini": (
        Case("mini teacher", ("+experiment=ksr_teacher_mini",), 64, 128),
        Case("mini student", ("+experiment=ksr_flash_mini", "model=mini_x2", *STEADY), 32, 128),
    ),
    "tiny": (
        Case("tiny teacher", (*TINY, "module=teacher", "loss=denoising"), 2, 32),
        Case("tiny student", (*TINY, "critic=tiny", *STEADY), 2, 32),
    ),
}


class Bench:
    """Times one case in several modes.

    Args:
        calls: Updates in a row; the counted ones are the same.
        also: Overrides of conf/train.yaml beside the case's own.
    """

    def __init__(
        self, case: Case, folder: Path, device: torch.device, *, calls: int, also: Sequence[str]
    ) -> None:
        config = composed(*case.overrides, *also, f"teacher={folder}")
        self.case, self.device, self.calls, self.also = case, device, calls, " ".join(also)
        if "distillation" in config["module"]["_target_"] and not (folder / "sr").exists():
            write_random_teacher(folder, config["model"], device)
        self.module = build_module(config, device)
        self.batch = random_batch(case.batch_size, case.crop_px, device)
        self.turns = turns_of(self.module)
        self.flops: dict[str, float] = {}
        self.captured_gb = 0.0
        self.rate = matmul_rate(device)

    def run_turn(self, turn: str) -> None:
        """Make one update, each time another of the ``calls`` ones."""
        self.module.update = FIRST_UPDATE + self.module.update % self.calls
        self.turns[turn](self.module, self.batch)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Give weights, averages and moments a memory format; drop graphs of the old addresses."""
        self.module.to(memory_format=memory_format)
        renew_optimizers(self.module)
        self.module.make_graph_runner()

    def count(self) -> None:
        """Count the operations of the updates that will be timed, on one picture of the batch."""
        whole, self.batch = self.batch, Batch(*(tensor[:1] for tensor in self.batch))
        torch.backends.cudnn.benchmark = False  # no autotuning for shapes that occur once
        with self.module.eager():
            for turn in self.turns:
                with ArithmeticCounter() as counter:
                    for _ in range(self.calls):
                        self.run_turn(turn)
                flops = counter.get_total_flops() / self.calls
                self.flops[turn] = flops * self.case.batch_size
        self.batch = whole
        torch.backends.cudnn.benchmark = True

    def warm_up(self) -> None:
        """Compile the networks, and print the progress, since it takes minutes."""
        for number in range(self.calls):
            with phase(f"{self.case.name}, {self.case.crop_px}²: update {number + 1} compiled"):
                self.run_turn("update")
                wait_for(self.device)
        self.capture("update")

    def capture(self, turn: str) -> None:
        """Run a turn until it is captured; record the peak memory, since replays allocate none."""
        for _ in range(WARM_UPS + 1):
            self.run_turn(turn)
        self.captured_gb = peak_gb(self.device) if self.module.graphs.backend else 0.0

    def rows(self, mode: str, *, repeats: int, turns: Sequence[str] | None = None) -> list[Row]:
        """Time the named turns; by default all."""
        timed = []
        for turn in turns or self.turns:
            self.capture(turn)
            times = time_calls(
                partial(self.run_turn, turn), calls=self.calls, repeats=repeats, device=self.device
            )
            timed.append(self.as_row(turn, mode, times))
        return timed

    def eager_rows(self, mode: str, **how: Any) -> list[Row]:
        """Time turns without compilation."""
        with self.module.eager():
            return self.rows(mode, **how)

    def as_row(self, turn: str, mode: str, times: Times) -> Row:
        """Return a table's line."""
        size, flops = self.case.batch_size, self.flops[turn]
        return Row(self.case.name, turn, mode, size, self.case.crop_px, times.seconds,
                   times.host_seconds, times.spread, size / times.seconds,
                   flops / times.seconds / 1e12, flops / times.seconds / self.rate,
                   max(times.peak_gb, self.captured_gb), self.rate / 1e12, self.also)  # fmt: skip


def recompute_activations(module: UpdateModule, yes: bool) -> None:
    """Let the student recompute its activations in the backward pass, or not."""
    network: Any = getattr(module, module.averaged)
    if yes:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()


def run_case(
    case: Case, options: argparse.Namespace, folder: Path, keep: Callable[[list[Row]], None]
) -> None:
    """Measure a case; beside other cases: prepare together, measure alone.

    Args:
        keep: Called after each part with the rows so far.
    """
    device = torch.device(options.device)
    name = f"{case.name}, {case.crop_px}²"
    with precision_of_training(device):
        with beside_others(options.lock):
            with phase(f"{name}: built"):
                bench = Bench(case, folder, device, calls=options.calls, also=options.also)
            with phase(f"{name}: counted"):
                bench.count()
            bench.lay_out(torch.channels_last)
            bench.warm_up()
            if options.compile_only:
                return
            keep(bench.rows("ours", repeats=1, turns=["update"]))
            release(device)
        with alone(options.lock), phase(f"{name}: measured"):
            bench.rate = matmul_rate(device)
            rows = bench.rows("ours", repeats=1 if options.quick else 3)
            keep(rows)
            if options.profile:
                print_profile(partial(bench.run_turn, "update"), calls=options.calls, device=device)
            release(device)
            bench.lay_out(torch.contiguous_format)
            rows += bench.eager_rows("eager", repeats=1, turns=["update"])
            keep(rows)
            release(device)
            recompute_activations(bench.module, True)
            keep(rows + bench.eager_rows("eager, recomputing", repeats=1, turns=["update"]))


def release(device: torch.device) -> None:
    """Release cached memory, which another case may need."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def locked(path: Path | None, kind: int) -> Iterator[None]:
    """Hold a file's lock, if there is a file."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, kind)
        yield


@contextmanager
def beside_others(lock: Path | None) -> Iterator[None]:
    """Hold the lock shared, to build or compile while others do."""
    with locked(lock, fcntl.LOCK_SH):
        yield


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold the lock exclusively, to measure while no other case compiles or measures."""
    with locked(lock, fcntl.LOCK_EX):
        yield


def run_here(
    case: Case, options: argparse.Namespace, keep: Callable[[list[Row]], None]
) -> list[Row]:
    """Return one case's rows; hand them over as they come, too."""
    rows: list[Row] = []

    def take(found: list[Row]) -> None:
        rows[:] = found
        keep(found)

    with tempfile.TemporaryDirectory() as scratch:
        run_case(case, options, Path(scratch), take)
    return rows


def command_of(number: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that measures one case and writes its rows into the folder."""
    flags = [f"--{name}" for name in ("profile", "quick", "compile-only")
             if getattr(options, name.replace("-", "_"))]  # fmt: skip
    return [sys.executable, "-m", "benchmarks.training", "--only", str(number),
            "--rows", str(folder / f"{number}.json"),
            "--device", options.device, "--calls", str(options.calls),
            "--lock", str(options.lock or folder / "lock"), "--also", *options.also, *flags,
            *([f"--{options.size}"] if options.size else [])]  # fmt: skip


def device_of(number: int) -> dict[str, str]:
    """Return the environment in which a case sees a device of its own, if there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number % count]}


def run_side_by_side(
    options: argparse.Namespace, numbers: Sequence[int], keep: Callable[[list[Row]], None]
) -> list[Row]:
    """Return all cases' rows, from a process each, since compiling takes most of the time.

    A case that is not ready in time is stopped; the rows that it has measured are kept.
    """
    threads = max(2, (os.cpu_count() or 2) // len(numbers))
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
                   **os.environ}  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processes = [
            subprocess.Popen(
                command_of(number, options, folder), env={**environment, **device_of(number)}
            )
            for number in numbers
        ]
        ends = time.monotonic() + options.limit_s
        while any(process.poll() is None for process in processes) and time.monotonic() < ends:
            time.sleep(2)
            rows = keep_new(rows, rows_in(folder), keep)
        for process in processes:
            process.kill()
            process.wait()
        return keep_new(rows, rows_in(folder), keep)


def keep_new(rows: list[Row], found: list[Row], keep: Callable[[list[Row]], None]) -> list[Row]:
    """Return the found rows; hand them over if there are new ones."""
    if found != rows:
        keep(found)
    return found


def rows_in(folder: Path) -> list[Row]:
    """Return the rows that the cases have written so far."""
    files = sorted(folder.glob("*.json"))
    return [Row(**row) for file in files for row in json.loads(file.read_text())]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace a file of rows atomically, since another process may be reading it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps([row._asdict() for row in rows]))
    new.replace(path)


def joined(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """Return the rows after those earlier ones that they do not replace."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.case, row.batch_size, row.crop_px, row.what, row.mode

    replaced = {key(row) for row in rows}
    return [row for row in earlier if key(row) not in replaced] + rows


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a run's results; none, if there are no results."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def as_results(rows: list[Row]) -> dict[str, Any]:
    """Return the content of the results' file."""
    return {**summary_of(rows), "rows": [row._asdict() for row in rows]}


def print_table(rows: list[Row]) -> None:
    """Print the rows as Markdown."""
    print("| case | crops | what | mode | s | host s | samples/s | TFLOP/s | share | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r.case} | {r.batch_size} × {r.crop_px}² | {r.what} | {r.mode} | {r.seconds:.4f} "
              f"| {r.host_seconds:.4f} | {r.samples_per_s:.1f} | {r.tflops:.1f} "
              f"| {r.share_of_matmul:.1%} | {r.peak_gb:.1f} |")  # fmt: skip


def against_one_rate(rows: list[Row]) -> list[Row]:
    """Return rows with shares of the run's fastest bf16 product, since others were disturbed."""
    best = max((row.matmul_tflops for row in rows), default=math.nan)
    return [r._replace(share_of_matmul=r.tflops / best, matmul_tflops=best) for r in rows]


def summary_of(rows: list[Row]) -> dict[str, float]:
    """Return the headline figures: the worst case's of the whole update."""

    def of(mode: str) -> dict[tuple[str, int], Row]:
        return {(r.case, r.crop_px): r for r in rows if r.what == "update" and r.mode == mode}

    ours, eager = of("ours"), of("eager")
    gains = [eager[key].seconds / ours[key].seconds for key in ours if key in eager]
    return {
        "share_of_matmul": min((row.share_of_matmul for row in ours.values()), default=math.nan),
        "speedup_over_eager": min(gains, default=math.nan),
        "matmul_tflops": statistics.median(row.matmul_tflops for row in rows),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or one of its cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    for size in ("mini", "tiny"):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases, from 0")
    parser.add_argument("--calls", type=int, default=CALLS, help="different updates in a row")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--profile", action="store_true", help="show the device's kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-s", type=float, default=900, help="for all cases together")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill the compiler's cache, measure nothing"
    )
    parser.add_argument("--also", nargs="*", default=[], help="overrides of conf/train.yaml")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other cases")
    parser.add_argument("--lock", type=Path, help="file that benchmarks at one time share")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = options.size or "full"
    numbers = options.only or range(len(CASES[size]))
    if options.rows:
        run_here(CASES[size][numbers[0]], options, partial(write_rows, options.rows))
        return
    name = "training" if size == "full" else f"training_{size}"
    path = options.json or RESULTS / f"{name}.json"
    earlier = rows_of(path) if options.add else []

    def keep(rows: list[Row]) -> None:
        write_results(path, as_results(joined(earlier, against_one_rate(rows))))

    if len(numbers) == 1:
        rows = run_here(CASES[size][numbers[0]], options, keep)
    else:
        rows = run_side_by_side(options, numbers, keep)
    if options.compile_only:
        return
    print_table(against_one_rate(rows))
    if not rows:
        raise SystemExit("error: no case was measured; see the output above")


if __name__ == "__main__":
    main()
