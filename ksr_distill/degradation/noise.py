"""Noise of Real-ESRGAN (arXiv:2107.10833, §3.2): Gaussian or Poisson, in colour or grey."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.degradation.draws import bernoulli, uniform
from ksr_distill.levels import to_levels

# ITU-R BT.601 luma.
GREY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Noise:
    """Which noise is drawn, and how strong.

    Attributes:
        gaussian_prob: Share of images with Gaussian noise; the others get Poisson noise.
        grey_prob: Share of images whose noise is the same in the three channels.
        gaussian_sigma: Range of the standard deviation, levels of 255.
        poisson_strength: Range of the factor on shot noise; 1 is a camera counting 255 photons
            at white.
    """

    gaussian_prob: float
    grey_prob: float
    gaussian_sigma: Sequence[float]
    poisson_strength: Sequence[float]


def add_random_noise(
    images: Float[Tensor, "b 3 h w"], noise: Noise, *, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Return the images with noise of their own kind and strength, clamped to [-1, 1]."""
    size, device = len(images), images.device
    is_gaussian = bernoulli(size, noise.gaussian_prob, device=device, generator=generator)
    is_grey = bernoulli(size, noise.grey_prob, device=device, generator=generator)
    sigma = uniform(size, *noise.gaussian_sigma, device=device, generator=generator)
    strength = uniform(size, *noise.poisson_strength, device=device, generator=generator)
    levels = to_levels(images)
    gaussian = _gaussian_levels(levels, generator=generator) * sigma[:, None, None, None]
    shot = _shot_levels(levels, generator=generator) * strength[:, None, None, None]
    grey, colour = (
        torch.where(is_gaussian[:, None, None, None], gaussian[:, at], shot[:, at])
        for at in (slice(0, 1), slice(1, 4))
    )
    added = torch.where(is_grey[:, None, None, None], grey, colour)
    return (images + added / 127.5).clamp(-1, 1)


def _gaussian_levels(
    levels: Float[Tensor, "b 3 h w"], *, generator: torch.Generator
) -> Float[Tensor, "b 4 h w"]:
    """Return unit noise: one grey channel, then three of colour."""
    b, _, h, w = levels.shape
    return torch.randn(b, 4, h, w, device=levels.device, generator=generator)


def _shot_levels(
    levels: Float[Tensor, "b 3 h w"], *, generator: torch.Generator
) -> Float[Tensor, "b 4 h w"]:
    """Return Poisson draws minus their mean, levels of 255: one grey channel, then three of colour.

    The paper's code counts an image's distinct levels to find its photons; for a photo that is
    nearly always 256, so it is 255 here and no image needs a host synchronisation.
    """
    grey = (levels * levels.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(1, keepdim=True)
    photons = torch.cat([grey, levels], dim=1)
    return torch.poisson(photons, generator=generator) - photons
