"""Random numbers, one per sample, each from the generator that was given."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def uniform(
    size: int, low: float, high: float, *, device: torch.device, generator: torch.Generator
) -> Float[Tensor, " b"]:
    """Return numbers in [low, high)."""
    return low + (high - low) * torch.rand(size, device=device, generator=generator)


def uniform_integers(
    size: int, low: int, high: int, *, device: torch.device, generator: torch.Generator
) -> Float[Tensor, " b"]:
    """Return whole numbers from low to high, both included, as floats."""
    return torch.randint(low, high + 1, (size,), device=device, generator=generator).float()


def bernoulli(
    size: int, prob: float, *, device: torch.device, generator: torch.Generator
) -> Bool[Tensor, " b"]:
    """Return True with probability ``prob``."""
    return torch.rand(size, device=device, generator=generator) < prob


def categorical(
    size: int, probs: Sequence[float], *, device: torch.device, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Return indices into ``probs``, which sum to one. Unlike multinomial it never synchronises."""
    draws = torch.rand(size, device=device, generator=generator)
    indices = torch.zeros(size, device=device, dtype=torch.long)
    for edge in list(accumulate(probs))[:-1]:
        indices += draws >= edge
    return indices
