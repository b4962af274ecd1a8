"""Shared by the benchmarks: the device's peak rate, synchronised times, files of results."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ksr_distill.training.run_record import describe_machine, package_versions

RESULTS = Path(__file__).parent / "results"
STARTER = Path(__file__).with_name("starter.py")


class Times(NamedTuple):
    """Seconds of one call.

    Attributes:
        seconds: Until the device has finished; the median of the repeats.
        host_seconds: Until the host had issued the work; near ``seconds``, the host is the limit.
        spread: Slowest repeat over the fastest.
        peak_gb: Device memory at its highest.
    """

    seconds: float
    host_seconds: float
    spread: float
    peak_gb: float


class Cost(NamedTuple):
    """A command's time and memory, from start to end.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of processor time.
        peak_mb: Largest resident memory of the process itself, if above the 12 MB of its starter.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float


def run_command(command: list[str]) -> Cost:
    """Run a command to its end and discard its output; exit if it fails."""
    done = subprocess.run(
        [sys.executable, "-I", STARTER, *command], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return Cost(*map(float, done.stdout.split()))


def wait_for(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], None], *, calls: int, repeats: int, device: torch.device
) -> Times:
    """Return the times of one call, from several in a row; warm up before."""
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, host = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        host.append((time.perf_counter() - start) / calls)
        wait_for(device)
        seconds.append((time.perf_counter() - start) / calls)
    median = statistics.median(seconds)
    return Times(median, statistics.median(host), max(seconds) / min(seconds), peak_gb(device))


def peak_gb(device: torch.device) -> float:
    """Return the peak of device memory since it was last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large bf16 product of random matrices, the reference of this run."""
    side, calls = (8192, 10) if device.type == "cuda" else (512, 3)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)

    time_calls(multiply, calls=3, repeats=1, device=device)
    times = time_calls(multiply, calls=calls, repeats=5, device=device)
    return 2 * side**3 / times.seconds


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print how long a part of the benchmark took."""
    start = time.perf_counter()
    yield
    print(f"[{time.perf_counter() - start:6.1f} s] {name}", flush=True)


def today() -> str:
    """Return the date in UTC, for the results."""
    return datetime.now(UTC).date().isoformat()


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results with the machine, the versions and the date."""
    machine = describe_machine()
    stamp = {
        "date": today(),
        "device": machine["gpus"] or f"{machine['num_cpus']} CPU cores",
        "versions": package_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, **stamp}, indent=1, ensure_ascii=False) + "\n")
    print(path)
