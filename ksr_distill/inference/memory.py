"""How much memory a tile takes, and how large a tile the memory allows."""

from pathlib import Path

import psutil
import torch
from torch import nn

from ksr_distill.inference.passes import SuperResolutionPass, TilePass
from ksr_distill.inference.refine import MOVQ_TILE_PX, RefinerPass
from ksr_distill.inference.teacher_pass import TeacherPass

ACTIVATIONS_PER_PX = {"cpu": 10, "cuda": 16}
"""Peak memory of the U-Net's forward in units of (pixels · stem channels): 5.6 to 10.8 in float32
and bfloat16 on a CPU, from 16 to 128 channels and 512² to 1280²; 13 at 2048² on an H200
(measured)."""

ACCELERATED_UNET_PER_PX, ACCELERATED_MOVQ_PER_PX = 4.5, 8
"""The same with the fast operations: 3.4 and 7.3 (measured)."""

LARGEST_TILE_PX = {"cpu": 1280, "cuda": 2048}
"""On a GPU 1024² → 2048² is one tile. On a CPU a megapixel doubled is four tiles of 1024 px in less
than 1.5 GB."""


def working_bytes(tile_pass: TilePass, tile_px: int, batch: int) -> int:
    """Return about what a pass needs for its weights and a batch of tiles."""
    modules = [value for value in vars(tile_pass).values() if isinstance(value, nn.Module)]
    weights = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    if isinstance(tile_pass, RefinerPass):
        # MoVQ's decoder takes the most, in tiles of its own size.
        tile_px, channels = min(tile_px, MOVQ_TILE_PX), tile_pass.movq.config.block_out_channels[0]
    elif isinstance(tile_pass, SuperResolutionPass):
        config = tile_pass.denoise.config
        channels = config.stem_channels or config.base_channels
    elif isinstance(tile_pass, TeacherPass):
        return weights + tile_pass.working_bytes(tile_px)
    else:
        return weights
    per_px: float = ACTIVATIONS_PER_PX.get(tile_pass.device.type, 16)
    if any(getattr(module, "is_accelerated", False) for module in modules):
        is_refiner = isinstance(tile_pass, RefinerPass)
        per_px = ACCELERATED_MOVQ_PER_PX if is_refiner else ACCELERATED_UNET_PER_PX
    return weights + int(tile_px**2 * channels * per_px * tile_pass.dtype.itemsize * batch)


def largest_fitting_tile(tile_pass: TilePass, device: torch.device) -> int:
    """Return the largest tile whose work fits into four fifths of the free memory.

    A teacher's tiles are larger, because its windows meet only inside of one.
    """
    budget = 0.8 * free_memory_bytes(device)
    largest = LARGEST_TILE_PX.get(device.type, 1024)
    if isinstance(tile_pass, TeacherPass):
        largest = tile_pass.largest_tile_px
    sides = [side for side in (4096, 2048, 1280, 1024, 512, 256) if side <= largest]
    return next((s for s in sides if working_bytes(tile_pass, s, 1) <= budget), sides[-1])


def free_memory_bytes(device: torch.device) -> int:
    """Return what the device has left; on a CPU within the container's limit."""
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
