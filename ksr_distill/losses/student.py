"""Optional student losses beside the adversarial one; none needs another network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def weighted_l1(
    pred_x_0: Float[Tensor, "b 3 H W"],
    x_0: Float[Tensor, "b 3 H W"],
    weight: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, ""]:
    """Return the mean of weight·|pred_x_0 - x_0|.

    Args:
        weight: a_t / a_229: an estimate from pure noise cannot be right pixel by pixel (ADD's
            c(t) = a_t, arXiv:2311.17042, §3.3).
    """
    return (weight * (pred_x_0.float() - x_0).abs()).mean()


def feature_matching_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the mean over levels of |n_k(fake) - n_k(real)| (arXiv:2506.05301, §3.3)."""
    pairs = zip(fake, real, strict=True)
    return torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs]).mean()


def lowres_consistency_loss(
    pred_x_0: Float[Tensor, "b 3 H W"], x_0: Float[Tensor, "b 3 H W"], *, scale: int
) -> Float[Tensor, ""]:
    """Return |A pred_x_0 - A x_0| with A the mean over scale × scale pixels.

    Holds colour and brightness at every timestep and leaves all finer detail free.
    """
    return (F.avg_pool2d(pred_x_0.float(), scale) - F.avg_pool2d(x_0, scale)).abs().mean()
