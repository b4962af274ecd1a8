"""Profiles of the device: kernels by name and by kind, and the gaps between them."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import wait_for

KINDS = {
    "convolution": ("conv", "cudnn", "fprop", "dgrad", "wgrad", "implicit"),
    "matrix product": ("gemm", "cublas", "nvjet"),
    "compiled": ("triton",),
    "optimiser": ("adam", "multi_tensor", "foreach"),
    "norm": ("norm", "rowwise", "gamma"),
    "copy": ("memcpy", "memset", "copy"),
    "collective": ("nccl",),
}


def kind_of(kernel: str) -> str:
    """Return a kernel's kind of work, by its name."""
    name = kernel.lower()
    order = ("compiled", "collective", "optimiser", "convolution", "matrix product", "norm", "copy")
    return next((k for k in order if any(part in name for part in KINDS[k])), "elementwise")


def print_profile(
    call: Callable[[], None], *, calls: int, device: torch.device, top: int = 30
) -> dict[str, float]:
    """Print the kernels that take most of a call's time; return milliseconds by kind."""
    on_cuda = device.type == "cuda"
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait_for(device)
    wall = (time.perf_counter() - start) / calls * 1e3
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            call()
        wait_for(device)
    kernels = [
        ((e.self_device_time_total if on_cuda else e.self_cpu_time_total) / calls / 1e3,
         e.count / calls, e.key)
        for e in profiler.key_averages()
    ]  # fmt: skip
    kernels.sort(reverse=True)
    kinds: dict[str, float] = {}
    for ms, _, name in kernels:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    busy = sum(kinds.values())
    count = sum(
        times for ms, times, _ in kernels if ms > 0
    )  # the others are calls that launch them
    print(f"a call takes {wall:.2f} ms; {count:.0f} kernels run for {busy:.2f} ms")
    print(" · ".join(f"{k} {v:.2f} ms" for k, v in sorted(kinds.items(), key=lambda i: -i[1])))
    for ms, times, name in kernels[:top]:
        print(f"  {ms:8.3f} ms {times:6.1f}×  {name[:110]}")
    return kinds
