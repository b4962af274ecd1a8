"""Distances between distributions of patches or crops: sliced Wasserstein, KID and FID."""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

PATCH_PX = 7  # arXiv:1710.10196, §5
NUM_PYRAMID_LEVELS = 4
MIN_SIDE_PX = PATCH_PX * 2 ** (NUM_PYRAMID_LEVELS - 1)


def laplacian_pyramid(
    images: Float[Tensor, "b c H W"], *, num_levels: int
) -> list[Float[Tensor, "b c _h _w"]]:
    """Return bands from fine to coarse, the last the low-pass residual (Burt and Adelson 1983)."""
    bands = []
    for _ in range(num_levels - 1):
        smaller = _binomial_blur(images)[..., ::2, ::2]
        zeros = torch.zeros_like(images)
        zeros[..., ::2, ::2] = smaller * 4
        bands.append(images - _binomial_blur(zeros))
        images = smaller
    return [*bands, images]


def sliced_wasserstein(
    images: Float[Tensor, "1 3 H W"],
    hires: Float[Tensor, "1 3 H W"],
    *,
    generator: torch.Generator,
    num_patches: int = 4096,
    num_projections: int = 128,
) -> Float[Tensor, " level"]:
    """Return the distance times 1000 per pyramid level, fine to coarse, of two images' patches.

    Patches of 7x7x3 values of a Laplacian pyramid, projected to random directions, compared by the
    1-Wasserstein distance (arXiv:1710.10196, §5). Two deviations, both because here an image has an
    original: both sides are divided by the *original's* standard deviation per level and channel
    (the paper normalises each by its own, which hides that detail is too weak), and patches are
    taken at the same positions, so that equal images have distance 0. The mean is not subtracted.

    Args:
        generator: Draws positions and directions on the CPU. Give each model the same.

    Raises:
        ValueError: If a side is shorter than `MIN_SIDE_PX`.
    """
    if min(hires.shape[-2:]) < MIN_SIDE_PX:
        raise ValueError(
            f"images of {hires.shape[-1]}x{hires.shape[-2]} px are too small for the sliced "
            f"Wasserstein distance; give at least {MIN_SIDE_PX} px a side"
        )
    pyramids = (
        laplacian_pyramid(x.float(), num_levels=NUM_PYRAMID_LEVELS) for x in (images, hires)
    )
    distances = []
    for ours, theirs in zip(*pyramids, strict=True):
        rows, columns = (side - PATCH_PX + 1 for side in theirs.shape[-2:])
        places = torch.randint(rows * columns, (num_patches,), generator=generator).to(hires.device)
        directions = torch.randn(num_projections, 3 * PATCH_PX**2, generator=generator)
        directions = F.normalize(directions, dim=1).to(hires.device)
        std = theirs.std(dim=(2, 3), keepdim=True).clamp_min(1e-8)
        projected = [
            (directions @ _patches(level / std, places)).sort(dim=1).values
            for level in (ours, theirs)
        ]
        distances.append((projected[0] - projected[1]).abs().mean() * 1e3)
    return torch.stack(distances)


class FeatureDistances(NamedTuple):
    """KID and FID, or why they were skipped."""

    kid: float | str
    fid: float | str


def feature_distances(
    ours: Float[Tensor, "n 3 s s"],
    theirs: Float[Tensor, "n 3 s s"],
    *,
    network: nn.Module,
    seed: int,
    batch_size: int = 32,
) -> FeatureDistances:
    """Return KID (arXiv:1801.01401) and FID (arXiv:1706.08500) between two sets of crops.

    The crops enter at their native resolution: the usual resizing to 299 px hides the detail that
    an upscaler adds. So compare models within one report, not with published numbers.

    Args:
        network: From images in [-1, 1] to one vector each; its `num_features` is their length.
        seed: Of the random subsets whose mean KID is.
    """
    num_crops, num_features = ours.shape[0], network(ours[:1]).shape[1]
    if num_crops < 16:
        too_few = f"skipped: {num_crops} crops are too few; give more or larger images"
        return FeatureDistances(kid=too_few, fid=too_few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features in memory
        kid = KernelInceptionDistance(network, subset_size=min(num_crops // 2, 1000), subsets=100)
    fid = FrechetInceptionDistance(network)
    metrics = [kid.to(ours.device), fid.to(ours.device)]
    for images, is_original in ((ours, False), (theirs, True)):
        for batch in images.split(batch_size):
            for metric in metrics:
                metric.update(batch, real=is_original)
    with torch.random.fork_rng():  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(seed)
        kid_mean = float(kid.compute()[0])
    if num_crops <= num_features:
        return FeatureDistances(
            kid=kid_mean,
            fid=f"skipped: {num_crops} crops are too few for {num_features} features",
        )
    return FeatureDistances(kid=kid_mean, fid=float(fid.compute()))


def native_crops(
    images: Float[Tensor, "1 3 H W"], *, crop_px: int
) -> Float[Tensor, "n 3 crop_px crop_px"]:
    """Return the crops of a grid from the top left corner, without a remainder at the edges."""
    crops = images.unfold(2, crop_px, crop_px).unfold(3, crop_px, crop_px)
    return crops.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, crop_px, crop_px)


def _binomial_blur(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    channels = images.shape[1]
    kernel = (taps[:, None] * taps[None, :]).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def _patches(level: Tensor, places: Tensor) -> Float[Tensor, "values patches"]:
    """Return the patches at the positions (row-major indices of their top left corners)."""
    windows = level[0].unfold(1, PATCH_PX, 1).unfold(2, PATCH_PX, 1)
    columns = windows.shape[2]
    chosen = windows[:, places // columns, places % columns]
    return chosen.permute(0, 2, 3, 1).reshape(-1, places.shape[0])
