"""Blur kernels of Real-ESRGAN (arXiv:2107.10833, §3.2 and §3.4), one per sample of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ksr_distill.degradation.draws import bernoulli, categorical, uniform

# Kernels of every size live in a square of the largest: §4.1, "{7, 9, ... 21}".
SMALLEST_KERNEL_PX = 7
LARGEST_KERNEL_PX = 21
NUM_KERNEL_SIZES = (LARGEST_KERNEL_PX - SMALLEST_KERNEL_PX) // 2 + 1
KERNEL_FAMILIES = (
    "isotropic",
    "anisotropic",
    "generalised_isotropic",
    "generalised_anisotropic",
    "plateau_isotropic",
    "plateau_anisotropic",
)


@dataclass(frozen=True)
class Blur:
    """Which blurs are drawn, and how strong.

    Attributes:
        prob: Share of images that are blurred.
        sinc_prob: Share of the blurred that get a sinc filter, which rings, instead of a Gaussian.
        family_probs: Shares of KERNEL_FAMILIES among the others; sum to one.
        sigma: Smallest and largest standard deviation, px.
        generalised_beta: Range of the exponent of generalised Gaussians; below 1 is peaked.
        plateau_beta: Range of the exponent of plateau kernels.
    """

    prob: float
    sinc_prob: float
    family_probs: Sequence[float]
    sigma: Sequence[float]
    generalised_beta: Sequence[float]
    plateau_beta: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.family_probs) != len(KERNEL_FAMILIES) or abs(sum(self.family_probs) - 1) > 1e-6:
            raise ValueError(
                f"degradation.*.blur.family_probs={list(self.family_probs)} must be "
                f"{len(KERNEL_FAMILIES)} shares that sum to 1: {', '.join(KERNEL_FAMILIES)}"
            )


def blur_images(
    images: Float[Tensor, "b 3 h w"], blur: Blur, *, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Return the images, each blurred by its own kernel or left as it was."""
    size, device = len(images), images.device
    chosen = bernoulli(size, blur.prob, device=device, generator=generator)
    kernels = draw_kernels(size, blur, device=device, generator=generator)
    return filter_where(images, chosen, kernels)


def filter_where(
    images: Float[Tensor, "b 3 h w"], chosen: Bool[Tensor, " b"], kernels: Float[Tensor, "b k k"]
) -> Float[Tensor, "b 3 h w"]:
    """Return the images, the chosen ones filtered; borders are mirrored."""
    from kornia.filters import filter2d  # noqa: PLC0415 -- a second of import, for this recipe only

    # A delta leaves an image as it was and spares a second pass.
    delta = torch.zeros_like(kernels)
    delta[:, kernels.shape[-1] // 2, kernels.shape[-1] // 2] = 1
    return filter2d(images, torch.where(chosen[:, None, None], kernels, delta), "reflect")


def draw_kernels(
    size: int, blur: Blur, *, device: torch.device, generator: torch.Generator
) -> Float[Tensor, "b k k"]:
    """Return one kernel for each sample; each sums to one."""
    half_px = _draw_half_px(size, device=device, generator=generator)
    is_sinc = bernoulli(size, blur.sinc_prob, device=device, generator=generator)
    # The cutoff of small kernels stays above pi/3: a lower one needs more than 13 px to ring.
    lowest = torch.where(half_px < 6, torch.pi / 3, torch.pi / 5)
    share = uniform(size, 0.0, 1.0, device=device, generator=generator)
    sinc = sinc_kernels(lowest + (torch.pi - lowest) * share, half_px)
    gaussian = _draw_gaussian_kernels(blur, half_px, generator=generator)
    return torch.where(is_sinc[:, None, None], sinc, gaussian)


def draw_sinc_kernels(
    size: int, *, device: torch.device, generator: torch.Generator
) -> Float[Tensor, "b k k"]:
    """Return the last filter's kernels (§3.4): cutoffs from pi/3 to pi."""
    half_px = _draw_half_px(size, device=device, generator=generator)
    cutoff = uniform(size, torch.pi / 3, torch.pi, device=device, generator=generator)
    return sinc_kernels(cutoff, half_px)


def sinc_kernels(
    cutoff: Float[Tensor, " b"], half_px: Float[Tensor, " b"]
) -> Float[Tensor, "b k k"]:
    """Return circular low-pass filters (eq. 6): cutoff / (2 pi r) * J1(cutoff r).

    Args:
        cutoff: Radians per pixel, up to pi.
        half_px: Half of the kernel's side; pixels beyond are zero.
    """
    y, x = _grid(cutoff)
    radius = (x.square() + y.square()).sqrt()
    cutoff = cutoff[:, None, None]
    # The limit at r = 0 is cutoff^2 / (4 pi); clamping keeps the other branch finite there.
    safe_radius = radius.clamp(min=1e-6)
    ring = cutoff / (2 * torch.pi * safe_radius) * torch.special.bessel_j1(cutoff * safe_radius)
    kernels = torch.where(radius == 0, cutoff.square() / (4 * torch.pi), ring)
    return _crop_and_normalise(kernels, half_px)


def gaussian_kernels(
    sigma_x: Float[Tensor, " b"],
    sigma_y: Float[Tensor, " b"],
    angle: Float[Tensor, " b"],
    beta: Float[Tensor, " b"],
    is_plateau: Bool[Tensor, " b"],
    half_px: Float[Tensor, " b"],
) -> Float[Tensor, "b k k"]:
    """Return (generalised) Gaussian kernels, eq. 2 and 3, or plateau kernels.

    With q = xᵀ Σ⁻¹ x they are exp(-q^beta / 2) and 1 / (1 + q^beta).

    Args:
        sigma_x: Standard deviation along the rotated x axis, px.
        sigma_y: The same along the rotated y axis.
        angle: Rotation, radians.
        beta: Shape; 1 is the Gaussian.
        is_plateau: Which of the two forms.
        half_px: Half of the kernel's side; pixels beyond are zero.
    """
    y, x = _grid(sigma_x)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = x * cos + y * sin, y * cos - x * sin
    q = (along / sigma_x[:, None, None]).square() + (across / sigma_y[:, None, None]).square()
    q = q.pow(beta[:, None, None])
    kernels = torch.where(is_plateau[:, None, None], 1 / (1 + q), torch.exp(-q / 2))
    return _crop_and_normalise(kernels, half_px)


def _draw_gaussian_kernels(
    blur: Blur, half_px: Float[Tensor, " b"], *, generator: torch.Generator
) -> Float[Tensor, "b k k"]:
    size, device = len(half_px), half_px.device
    family = categorical(size, blur.family_probs, device=device, generator=generator)
    sigma_x, sigma_y = (
        uniform(size, *blur.sigma, device=device, generator=generator) for _ in range(2)
    )
    angle = uniform(size, -torch.pi, torch.pi, device=device, generator=generator)
    generalised = uniform(size, *blur.generalised_beta, device=device, generator=generator)
    plateau = uniform(size, *blur.plateau_beta, device=device, generator=generator)
    form, is_isotropic = family // 2, family % 2 == 0  # the order of KERNEL_FAMILIES
    beta = torch.where(form == 1, generalised, torch.where(form == 2, plateau, 1.0))
    return gaussian_kernels(
        sigma_x, torch.where(is_isotropic, sigma_x, sigma_y), angle, beta, form == 2, half_px
    )


def _draw_half_px(
    size: int, *, device: torch.device, generator: torch.Generator
) -> Float[Tensor, " b"]:
    drawn = torch.randint(NUM_KERNEL_SIZES, (size,), device=device, generator=generator)
    return (drawn + SMALLEST_KERNEL_PX // 2).float()


def _grid(like: Float[Tensor, " b"]) -> tuple[Float[Tensor, "k 1"], Float[Tensor, "1 k"]]:
    half = LARGEST_KERNEL_PX // 2
    place = torch.arange(-half, half + 1, device=like.device, dtype=like.dtype)
    return place[:, None], place[None]


def _crop_and_normalise(
    kernels: Float[Tensor, "b k k"], half_px: Float[Tensor, " b"]
) -> Float[Tensor, "b k k"]:
    y, x = _grid(half_px)
    inside = torch.maximum(x.abs(), y.abs()) <= half_px[:, None, None]
    kernels = kernels * inside
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)
