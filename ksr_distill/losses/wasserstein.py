"""The Wasserstein loss (arXiv:1701.07875, eq. 2–3). Unlike the hinge loss it never saturates.

``scores`` are a critic's maps, one tensor (b, 1, h_k, w_k) a level. D(u) is the mean over levels of
the mean over places.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def mean_score(scores: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return E[D(u)], the mean over levels, batch and places."""
    return torch.stack([level.float().mean() for level in scores]).mean()


def critic_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return E[D(fake)] - E[D(real)], which the critic minimises."""
    return mean_score(fake) - mean_score(real)


def student_loss(fake: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return -E[D(fake)], which the student minimises."""
    return -mean_score(fake)


def drift_penalty(real: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return E[D(real)²], which keeps scores near zero (arXiv:1710.10196, appendix A.1)."""
    return mean_score([level.float().square() for level in real])
