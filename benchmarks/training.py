"""How fast an update of training is, against the arithmetic it needs and against plain PyTorch.

    python -m benchmarks.training                 # full size: 16 crops of 256², 4 of 512²
    python -m benchmarks.training --mini          # the shipped small model's teacher and student
    python -m benchmarks.training --tiny          # seconds on a CPU
    python -m benchmarks.training --mini --profile

``eager`` is the same algorithm without compilation, in PyTorch's own memory format; ``ours`` is
what conf/train.yaml sets. TFLOP/s are those of convolutions and matrix products, counted in eager
updates with the same draws, over the time of an update; their share is of a large bf16 product's.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.boards import (
    STEADY,
    composed,
    deal_optimizers,
    make_board,
    precision_of_training,
    random_batch,
    turns_of,
    write_random_teacher,
)
from benchmarks.measuring import (
    RESULTS,
    Times,
    matmul_rate,
    phase,
    time_calls,
    wait_for,
    write_results,
)
from benchmarks.profiling import print_profile
from ksr_distill.training.arithmetic import ArithmeticCounter
from ksr_distill.training.base import UpdateModule

FIRST_UPDATE = 100  # draws are a function of it: all rows see the same


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


FULL = ("module=distillation", "model=ksr_x2", *STEADY)
TINY = ("model=tiny", "compile_networks=false")  # a CPU compiles for longer than a test may take
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
        rate: FLOP/s of a large matrix product.
        calls: Updates in a row; the counted ones are the same.
    """

    def __init__(
        self, case: Case, folder: Path, device: torch.device, *, rate: float, calls: int
    ) -> None:
        config = composed(*case.overrides, f"teacher={folder}")
        self.case, self.device, self.rate, self.calls = case, device, rate, calls
        if "distillation" in config["module"]["_target_"] and not (folder / "sr").exists():
            write_random_teacher(folder, config["model"])
        self.module = make_board(config, device)
        self.batch = random_batch(case.batch_size, case.crop_px, device)
        self.turns = turns_of(self.module)
        self.flops: dict[str, float] = {}

    def count(self, turn: str) -> None:
        """Count the arithmetic of the updates that will be timed."""
        counter = ArithmeticCounter()
        with torch.compiler.set_stance("force_eager"), counter:
            for _ in range(self.calls):
                self.play(turn)
        self.flops[turn] = counter.get_total_flops() / self.calls

    def play(self, turn: str) -> None:
        """Make one update, each time another of the ``calls`` ones."""
        self.module.update = FIRST_UPDATE + self.module.update % self.calls
        self.turns[turn](self.module, self.batch)

    def eager(self, repeats: int) -> list[Row]:
        """Return the baseline's rows."""
        self.module.to(memory_format=torch.contiguous_format)
        deal_optimizers(self.module)
        with torch.compiler.set_stance("force_eager"):
            for turn in self.turns:
                self.count(turn)
            return [self.row(turn, "eager", repeats) for turn in self.turns]

    def ours(self, repeats: int, mode: str = "ours") -> list[Row]:
        """Return the rows of conf/train.yaml's settings."""
        torch._dynamo.reset()
        self.module.to(memory_format=torch.channels_last)
        deal_optimizers(self.module)
        with phase(f"{self.case.name} {self.case.crop_px}: compiled, for {mode}"):
            for turn in self.turns:
                for _ in range(self.calls):
                    self.play(turn)
            wait_for(self.device)
        return [self.row(turn, mode, repeats) for turn in self.turns]

    def row(self, turn: str, mode: str, repeats: int) -> Row:
        """Time a turn."""
        self.play(turn)
        times = time_calls(
            lambda: self.play(turn), calls=self.calls, repeats=repeats, device=self.device
        )
        return self.as_row(turn, mode, times)

    def as_row(self, turn: str, mode: str, times: Times) -> Row:
        """Return a table's line."""
        size, flops = self.case.batch_size, self.flops[turn]
        return Row(self.case.name, turn, mode, size, self.case.crop_px, times.seconds,
                   times.host_seconds, times.spread, size / times.seconds,
                   flops / times.seconds / 1e12, flops / times.seconds / self.rate,
                   times.peak_gb)  # fmt: skip


def checkpointed(module: UpdateModule) -> None:
    """Let the student recompute its activations in the backward pass."""
    network: Any = getattr(module, module.averaged)
    network.enable_gradient_checkpointing()


def run_case(case: Case, options: argparse.Namespace, *, rate: float, folder: Path) -> list[Row]:
    """Return a case's rows."""
    device = torch.device(options.device)
    with precision_of_training(device):
        with phase(f"{case.name} {case.crop_px}: built"):
            bench = Bench(case, folder, device, rate=rate, calls=options.calls)
        with phase(f"{case.name} {case.crop_px}: eager"):
            rows = bench.eager(repeats=1 if options.quick else 2)
        rows += bench.ours(repeats=1 if options.quick else 3)
        if options.profile:
            print_profile(lambda: bench.play("update"), calls=options.calls, device=device)
        if options.checkpointing:
            checkpointed(bench.module)
            rows += bench.ours(1, mode="ours, activations recomputed")
    return rows


def print_table(rows: list[Row]) -> None:
    """Print the rows as Markdown."""
    print("| case | crops | what | mode | s | host s | samples/s | TFLOP/s | share | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r.case} | {r.batch_size} × {r.crop_px}² | {r.what} | {r.mode} | {r.seconds:.4f} "
              f"| {r.host_seconds:.4f} | {r.samples_per_s:.1f} | {r.tflops:.1f} "
              f"| {r.share_of_matmul:.1%} | {r.peak_gb:.1f} |")  # fmt: skip


def summary_of(rows: list[Row]) -> dict[str, float]:
    """Return the figures to remember: of the whole update, the worst of the cases."""

    def of(mode: str) -> dict[tuple[str, int], Row]:
        return {(r.case, r.crop_px): r for r in rows if r.what == "update" and r.mode == mode}

    ours, eager = of("ours"), of("eager")
    return {
        "share_of_matmul": min(row.share_of_matmul for row in ours.values()),
        "speedup_over_eager": min(eager[key].seconds / ours[key].seconds for key in ours),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    for size in ("mini", "tiny"):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases, from 0")
    parser.add_argument("--calls", type=int, default=4, help="different updates in a row")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--profile", action="store_true", help="show the device's kernels")
    parser.add_argument("--checkpointing", action="store_true", help="a row with recomputation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    size = options.size or "full"
    rate = matmul_rate(torch.device(options.device))
    print(f"bf16 matmul: {rate / 1e12:.1f} TFLOP/s", flush=True)
    cases = CASES[size]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in [cases[i] for i in options.only or range(len(cases))]:
            rows += run_case(case, options, rate=rate, folder=Path(scratch))
            gc.collect()
    print_table(rows)
    name = "training" if size == "full" else f"training_{size}"
    write_results(
        options.json or RESULTS / f"{name}.json",
        {"matmul_tflops": rate / 1e12, **summary_of(rows), "rows": [r._asdict() for r in rows]},
    )


if __name__ == "__main__":
    main()
