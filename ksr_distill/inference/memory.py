"""Estimates of a tile's memory, and the largest tile that fits."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import psutil
import torch
from torch import nn

ACTIVATIONS_PER_PX = {"cpu": 10, "cuda": 16}
"""Peak memory of the U-Net's forward in units of (pixels · stem channels): 5.6 to 10.8 in float32
and bfloat16 on a CPU, from 16 to 128 channels and 512² to 1280²; 13 at 2048² on an H200
(measured)."""

ACCELERATED_UNET_PER_PX, ACCELERATED_MOVQ_PER_PX = 4.5, 8
"""The same with the fast operations: 3.4 and 7.3 (measured)."""

LARGEST_TILE_PX = {"cpu": 1280, "cuda": 2048}
"""On a GPU 1024² → 2048² is one tile. On a CPU a megapixel doubled is four tiles of 1024 px in less
than 1.5 GB."""


@runtime_checkable
class Worker(Protocol):
    """What the largest tile is found for: a pass."""

    @property
    def largest_tile_px(self) -> int | None:
        """The largest side of a tile that the network allows; None: no limit."""
        ...

    def working_bytes(self, tile_px: int, batch: int) -> int:
        """Return an estimate of the memory for the weights and a batch of tiles."""
        ...


def peak_bytes(
    networks: Sequence[nn.Module],
    *,
    px: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    accelerated_per_px: float,
) -> int:
    """Return an estimate of the memory for the networks' weights and the largest of their forwards.

    Args:
        px: Pixels at once, all of a batch.
        channels: Of the widest forward's first level.
        accelerated_per_px: Its peak with the fast operations, in units of (pixels · channels).
    """
    per_px: float = ACTIVATIONS_PER_PX.get(device.type, 16)
    if any(getattr(network, "is_accelerated", False) for network in networks):
        per_px = accelerated_per_px
    return weight_bytes(networks) + int(px * channels * per_px * dtype.itemsize)


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Return what the weights of networks take."""
    return sum(p.numel() * p.element_size() for n in networks for p in n.parameters())


def largest_fitting_tile(worker: Worker, device: torch.device) -> int:
    """Return the largest tile whose work fits into four fifths of the free memory."""
    budget = 0.8 * free_memory_bytes(device)
    largest = worker.largest_tile_px or LARGEST_TILE_PX.get(device.type, 1024)
    sides = [side for side in (4096, 2048, 1280, 1024, 512, 256) if side <= largest]
    return next((s for s in sides if worker.working_bytes(s, 1) <= budget), sides[-1])


def free_memory_bytes(device: torch.device) -> int:
    """Return the device's free memory; on a CPU within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    limit, usage = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(usage.read_text()))
    return available


def as_size(num_bytes: float | int) -> str:
    """Return bytes for people: 1.3 GB."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
