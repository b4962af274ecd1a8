"""Gradient penalties that bound the critic's slope; all act on the heads, never on the trunk."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Heads(Protocol):
    """A critic's trained part."""

    def scores_and_slopes(
        self, features: Sequence[Tensor], t: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return each level's map D_k, and ∂ΣD_k / ∂n_k; both can be differentiated."""
        ...


def scores_and_r1(
    heads: Heads, features: Sequence[Tensor], t: Tensor
) -> tuple[list[Tensor], Float[Tensor, ""]]:
    """Return the heads' scores of the real features and their R1 penalty, both differentiable.

    Args:
        features: The heads' inputs, detached from the trunk.
        t: The timestep at which the critic looks.
    """
    scores, slopes = heads.scores_and_slopes(features, t)
    return scores, r1_head_penalty(slopes)


def r1_head_penalty(slopes: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the mean over levels, batch and places of ‖∂ΣD_k / ∂n_k(real)‖²_C.

    ADD's R1 on the heads' inputs (arXiv:2311.17042, §3.2). A mean over places, so that γ does not
    depend on the crop; double backward runs through the heads alone.

    Args:
        slopes: ∂ΣD_k / ∂n_k, a level each.
    """
    return torch.stack([slope.float().square().sum(dim=1).mean() for slope in slopes]).mean()


def wgan_gp_head_penalty(
    heads: Heads,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    t: Tensor,
    mixing: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, ""]:
    """Return the mean over levels and samples of (‖∂D_k / ∂ñ_k‖ - 1)² (arXiv:1704.00028, eq. 3).

    ñ_k lies between n_k(real) and n_k(fake): legitimate, because both live in one frozen feature
    space. D_k here is the sum over places divided by their square root, so that a slope of one a
    place counts as one whatever the crop.

    Args:
        mixing: One weight a sample, uniform in [0, 1].
    """
    mixed = [
        torch.lerp(a.detach().float(), b.detach().float(), mixing)
        for a, b in zip(fake, real, strict=True)
    ]
    levels, slopes = heads.scores_and_slopes(mixed, t)
    norms = [
        slope.flatten(1).norm(dim=1) / level[0].numel() ** 0.5
        for level, slope in zip(levels, slopes, strict=True)
    ]
    return torch.stack([(norm - 1).square().mean() for norm in norms]).mean()


def approximate_r1_penalty(
    scores: Sequence[Tensor], perturbed: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Return E[(D(real) - D(real + σξ))²] (APT, arXiv:2501.08316, eq. 2); no double backward.

    Both sets of scores must see the same timestep and the same noise, or the penalty measures
    those instead.
    """
    pairs = zip(scores, perturbed, strict=True)
    return torch.stack([(a.float() - b.float()).square().mean() for a, b in pairs]).mean()
