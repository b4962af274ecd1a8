"""LPIPS, the perceptual distance in a network's features (arXiv:1801.03924)."""

from pathlib import Path

import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from jaxtyping import Float
from torch import Tensor, nn

from ksr_distill.evaluation.feature_network import Backbone, FeatureNetwork


class LPIPS(nn.Module):
    """LPIPS version 0.1 on a given trunk, with the linear heads that torchmetrics packages."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network
        self.heads = nn.ParameterList(linear_heads(network.backbone))
        self.eval().requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], hires: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        """Return the distance per image: eq. 1 of arXiv:1801.03924. 0 is equal; smaller is better.

        Args:
            images: In [-1, 1].
        """
        distance = images.new_zeros(images.shape[0])
        levels = zip(
            self.heads, self.network.levels(images), self.network.levels(hires), strict=True
        )
        for head, ours, theirs in levels:
            difference = (_unit_length(ours) - _unit_length(theirs)).square()
            distance = distance + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return distance


def linear_heads(backbone: Backbone) -> list[Float[Tensor, "1 _c 1 1"]]:
    """Return the learned weight of each channel, level by level, from torchmetrics' wheel."""
    path = Path(torchmetrics_lpips.__file__).parent / "lpips_models" / f"{backbone}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{level}.model.1.weight"] for level in range(len(state))]


def _unit_length(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    # 1e-8 under the root, as in the published code since 2023 and in torchmetrics.
    return features / (1e-8 + features.square().sum(dim=1, keepdim=True)).sqrt()
