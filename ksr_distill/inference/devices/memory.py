"""Estimates of a tile's memory, and the largest tile that fits."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
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

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

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
    """Return what the device has left; on a CPU within the limits of the container or the job.

    What torch keeps on a GPU for its next tensors is free to them: without it, a folder's second
    picture would get smaller tiles than its first.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *_left_within_limits(CGROUPS, OWN_CGROUP)])


def _left_within_limits(root: Path, own: Path) -> list[int]:
    """Return what each limit above this process leaves (Linux, cgroup v2).

    A container sees its own limit at the root, a job of Slurm or of systemd its in a folder below.
    Pages of files that were read count as used, but go when memory is wanted.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    place = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    left = []
    for folder in (root / place, *(root / place).parents):
        with suppress(OSError, ValueError):  # no limit, or one that cannot be seen here
            bound = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            left.append(bound - used + _inactive_file_bytes(folder / "memory.stat"))
    return left


def _inactive_file_bytes(statistics: Path) -> int:
    """Return the bytes of a cgroup's pages of files that nobody has used lately."""
    with suppress(OSError, ValueError):
        fields = dict(line.split() for line in statistics.read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    return 0


def as_size(num_bytes: float | int) -> str:
    """Return bytes for people: 1.3 GB."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
