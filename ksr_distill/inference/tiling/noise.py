"""Noise as a function of (seed, stage, draw, absolute pixel coordinate).

Each tile takes its window of one infinite noise picture. So the result depends neither on the order
of the tiles, nor on how many are denoised at once, nor on how many processes share them, and
neighbouring tiles see the same noise where they overlap. The numbers come from Philox-4x32-10, a
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
the coordinate is the counter, the seed the key. The integers are the same on every device; the
normals agree to float32 rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.types import NoiseSource

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
NORMALS_PER_COUNTER = 4

CACHE_SIZED = 1 << 17
"""Counters worked on at once on a CPU: three times faster than a whole 1024² window,
because the hundred passes then stay in the cache (measured, 2 cores)."""


@dataclass(frozen=True)
class PlaceNoise:
    """The noise of one stage of one job.

    Attributes:
        seed: Any 63-bit integer.
        stage: Which pass: passes never share noise. Below 2**15.
    """

    seed: int
    stage: int = 0

    def draw(
        self,
        draw: int,
        window: Window,
        *,
        channels: int = 3,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "c h w"]:
        """Return N(0, 1) noise of a window.

        Args:
            draw: Which draw of the stage, below 2**16: 0 starts, i + 1 is the noise of step i.
        """
        rows_at_once = window.height
        if torch.device(device).type == "cpu":
            rows_at_once = max(1, CACHE_SIZED // window.width)
        tops = range(window.top, window.top + window.height, rows_at_once)
        bottom = window.top + window.height
        strips = [
            self._strip(draw, window, range(top, min(top + rows_at_once, bottom)), channels, device)
            for top in tops
        ]
        return torch.cat(strips, dim=1)

    def source(
        self, windows: Sequence[Window], *, channels: int = 3, device: torch.device | str = "cpu"
    ) -> NoiseSource:
        """Return the sampling loop's noise for a batch of windows of one size."""

        def draw_noise(draw: int) -> Tensor:
            options = {"channels": channels, "device": device}
            return torch.stack([self.draw(draw, window, **options) for window in windows])

        return draw_noise

    def _strip(
        self, draw: int, window: Window, rows: range, channels: int, device: torch.device | str
    ) -> Float[Tensor, "c h w"]:
        y = torch.arange(rows.start, rows.stop, device=device)[:, None].expand(-1, window.width)
        x = torch.arange(window.left, window.left + window.width, device=device).expand_as(y)
        normals: list[Tensor] = []
        for group in range(math.ceil(channels / NORMALS_PER_COUNTER)):
            stage_and_draw = torch.full_like(y, self.stage << 16 | draw)
            counter = (x, y, stage_and_draw, torch.full_like(y, group))
            bits = philox_4x32(counter, key=(self.seed & MASK, self.seed >> 32 & MASK))
            normals += [*box_muller(bits[0], bits[1]), *box_muller(bits[2], bits[3])]
        return torch.stack(normals[:channels])


Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four 32-bit words, each an int64 tensor of one shape."""


def philox_4x32(counter: Words, *, key: tuple[int, int]) -> Words:
    """Return Philox-4x32-10 of every counter; words are int64 tensors in [0, 2**32).

    int64 products wrap, which keeps the low 64 bits that the algorithm wants.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product_1 >> 32).bitwise_and_(MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product_0 >> 32).bitwise_and_(MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_1.bitwise_and_(MASK), product_0.bitwise_and_(MASK)
        k0, k1 = (k0 + WEYL_STEPS[0]) & MASK, (k1 + WEYL_STEPS[1]) & MASK
    return c0, c1, c2, c3


def box_muller(
    radius_bits: Int[Tensor, "*n"], angle_bits: Int[Tensor, "*n"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Return two independent normals from two 32-bit words (Box and Muller, 1958).

    The upper 24 bits are used, so that float32 holds them exactly; the largest normal is 5.9.
    """
    scale = 2.0**-24
    radius = ((radius_bits >> 8).float() + 0.5).mul_(scale).log_().mul_(-2).sqrt_()
    angle = (angle_bits >> 8).float().mul_(2 * math.pi * scale)
    return radius * angle.cos(), radius * angle.sin()
