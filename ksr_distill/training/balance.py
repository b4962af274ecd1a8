"""Weighs the student's loss terms against each other by their gradients at pred_x_0."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

NORM_MEMORY = 0.99
"""Decay of each term's running mean square, per student update; a judgement, not tuned."""


class GradientBalance(nn.Module):
    """Scales each term's gradient at pred_x_0 by its running norm, then adds them up.

    The norms are those of *earlier* updates, averaged over all ranks and micro-batches. So the
    gradient of a global batch does not depend on how it is cut into ranks and micro-batches. The
    unit is the gradient of a mean L1: a weight of 0.5 pushes half as hard as a plain L1 would.

    Args:
        weights: By term; those of weight 0 are left out.
        enabled: If off, the terms are simply weighted.
        floor: Smallest norm to divide by, as a share of the largest so far, so that a gradient
            that has nearly vanished is not scaled up to full strength.
    """

    mean_squares: Tensor
    largest: Tensor
    num_turns: Tensor

    def __init__(self, weights: Mapping[str, float], *, enabled: bool, floor: float) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.enabled = enabled
        self.floor = floor
        self.register_buffer("mean_squares", torch.zeros(len(self.weights)))
        self.register_buffer("largest", torch.zeros(len(self.weights)))
        self.register_buffer("num_turns", torch.zeros(()))

    def push(
        self, losses: Mapping[str, Tensor], pred_x_0: Float[Tensor, "b 3 H W"]
    ) -> tuple[Float[Tensor, "b 3 H W"], Float[Tensor, " terms"]]:
        """Return the weighted sum of the terms' gradients at pred_x_0, and each one's square norm.

        The sum is zero in the first turn, which has no earlier norms to divide by.

        Args:
            losses: Means over the micro-batch, by term; their graphs are kept.
        """
        batch, numel = pred_x_0.shape[0], pred_x_0[0].numel()
        total, measured = torch.zeros_like(pred_x_0), []
        for i, (name, weight) in enumerate(self.weights.items()):
            (gradient,) = torch.autograd.grad(losses[name], pred_x_0, retain_graph=True)
            measured.append(gradient.square().sum() * batch)
            total += weight * gradient * (self._scale(i, numel) if self.enabled else 1.0)
        return total, torch.stack(measured)

    def end_turn(self, measures: Sequence[Float[Tensor, " terms"]]) -> dict[str, Tensor]:
        """Update the running norms; return them by term.

        Args:
            measures: What ``push`` returned for each of the turn's micro-batches.
        """
        measured = torch.stack(list(measures)).mean(dim=0)
        if dist.is_initialized():
            dist.all_reduce(measured)
            measured /= dist.get_world_size()
        # A non-finite gradient skips its update; in the running norms it would stay for ever.
        kept = torch.where(measured.isfinite().all(), measured, self.norms().square())
        self.mean_squares.lerp_(kept, 1 - NORM_MEMORY)
        self.num_turns += 1
        norms = self.norms()
        torch.maximum(self.largest, norms, out=self.largest)
        return {f"health/push_{name}": norms[i] for i, name in enumerate(self.weights)}

    def norms(self) -> Float[Tensor, " terms"]:
        """Return each term's running norm per image, bias-corrected as by Adam; 0 at first."""
        seen = 1 - NORM_MEMORY**self.num_turns
        return (self.mean_squares / seen.clamp_min(1e-12)).sqrt()

    def _scale(self, index: int, numel: int) -> Float[Tensor, ""]:
        norm = torch.maximum(self.norms(), self.floor * self.largest)[index]
        return torch.where(self.num_turns > 0, 1 / (norm * numel**0.5 + 1e-12), 0.0)
