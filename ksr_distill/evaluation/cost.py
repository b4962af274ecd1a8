"""Measures time, and peak memory above that of the loaded model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
MIB = 2**20
PROC = Path("/proc/self")


class Cost(NamedTuple):
    """Cost of one call. Memory is None where it cannot be measured: off CUDA and off Linux."""

    seconds: float
    peak_memory_mib: float | None


def measure_cost(call: Callable[[], Result], *, device: torch.device) -> tuple[Result, Cost]:
    """Return the call's result and its cost.

    On CUDA the peak is the allocator's, on Linux the process's resident memory.
    """
    before_mib = _start_peak(device)
    started = time.perf_counter()
    result = call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - started
    peak_mib = _read_peak(device)
    if before_mib is None or peak_mib is None:
        return result, Cost(seconds, None)
    return result, Cost(seconds, max(0.0, peak_mib - before_mib))


def _start_peak(device: torch.device) -> float | None:
    """Reset the peak and return the memory in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / MIB
    try:
        (PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return None
    return _status_mib("VmRSS")


def _read_peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return _status_mib("VmHWM")


def _status_mib(key: str) -> float | None:
    status = PROC / "status"
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None
