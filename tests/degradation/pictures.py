"""Pictures that need no file: smooth shapes, edges and texture, in colour."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def picture(height: int = 96, width: int = 128, seed: int = 0) -> Tensor:
    """One uint8-exact image in [-1, 1], (1, 3, height, width)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / (3 + 5 * c) + y / 17) + np.cos(y / (7 + c) - x / 29) for c in range(3)]
    edges = ((x // 23 + y // 31) % 2)[..., None] * rng.uniform(40, 90, 3)
    levels = np.stack(waves, -1) * 35 + edges + 80 + rng.normal(0, 6, (height, width, 3))
    return as_tensor(levels.round().clip(0, 255).astype(np.uint8))


def as_tensor(array: np.ndarray) -> Tensor:
    return (torch.from_numpy(array.copy()).float() / 127.5 - 1).permute(2, 0, 1)[None]


def as_pillow(image: Tensor) -> Image.Image:
    levels = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.numpy())


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))
