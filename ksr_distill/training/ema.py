"""The exponential moving average of one network: what is validated, and what is shipped."""

import torch
from torch import Tensor, nn


def ema_decay(updates: int, final: float) -> float:
    """Return the decay after this many updates: it rises to ``final`` as (1 + n)/(10 + n).

    Without the rise a short run's average would be mostly its starting point.
    """
    return min(final, (1 + updates) / (10 + updates))


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, *, decay: float, moved: Tensor) -> None:
    """Move the average towards the network, in place, on the device.

    Args:
        decay: In [0, 1]; 1 keeps the average.
        moved: 1 where the network took its update, 0 where it was skipped; a 0-dim tensor, so that
            the host does not synchronise.
    """
    averages: list[Tensor] = list(average.parameters())
    weights: list[Tensor] = list(network.parameters())
    steps = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(steps, (1 - decay) * moved)
    torch._foreach_add_(averages, steps)
