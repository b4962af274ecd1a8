"""The critic (the paper's discriminator): trained heads on the teacher's frozen encoder."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vjp

from ksr_distill.models.blocks import TimeEmbedding
from ksr_distill.models.norms import GroupNorm, group_norm
from ksr_distill.models.unet import KSRUNet

HEAD_GROUPS = 8


class CriticHead(nn.Module):
    """Turns one level's features into a map of scores.

    GN → SiLU → 1×1 → {GN·(scale + 1) + shift by time → SiLU → 3×3} + residual → GN → SiLU → 1×1:
    Kandinsky 3.1's head (arXiv:2312.03511, fig. 3) without its cross-attention; there is no text.
    """

    def __init__(self, in_channels: int, channels: int, time_embedding_dim: int) -> None:
        super().__init__()
        self.norm_in = GroupNorm(HEAD_GROUPS, in_channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 1)
        self.time_projection = nn.Linear(time_embedding_dim, 2 * channels)
        self.norm = GroupNorm(HEAD_GROUPS, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_out = GroupNorm(HEAD_GROUPS, channels)
        self.conv_out = nn.Conv2d(channels, 1, 1)

    def forward(
        self, features: Float[Tensor, "b c h w"], time_embedding: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b 1 h w"]:
        """Return unbounded scores, larger where the picture looks real."""
        scale, shift = self.scale_shift(time_embedding)
        hidden = self.conv_in(self.first(features))
        hidden = hidden + self.conv(self.middle(hidden, scale, shift))
        return self.conv_out(self.last(hidden))

    def scores_and_slopes(
        self, features: Float[Tensor, "b c h w"], time_embedding: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b c h w"]]:
        """Return the scores and their slopes, ∂Σscores / ∂features; both are differentiable.

        The slopes are written as a forward pass that goes back through the layers, each convolution
        as its transpose. PyTorch's own second derivative convolves with kernels as large as the
        picture: with it, R1 took eleven times as long on two CPU cores.
        """
        scale, shift = self.scale_shift(time_embedding)
        hidden, through_first = vjp(self.first, features)[:2]
        entered = self.conv_in(hidden)
        middle = partial(self.middle, scale=scale, shift=shift)
        hidden, through_middle = vjp(middle, entered)[:2]
        hidden, through_last = vjp(self.last, entered + self.conv(hidden))[:2]
        scores = self.conv_out(hidden)
        (slope,) = through_last(through(self.conv_out, torch.ones_like(scores)))
        slope = slope + through_middle(through(self.conv, slope))[0]
        return scores, through_first(through(self.conv_in, slope))[0]

    def scale_shift(self, time_embedding: Float[Tensor, "b d"]) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the middle norm for a timestep."""
        both = self.time_projection(F.silu(time_embedding))[:, :, None, None]
        scale, shift = both.chunk(2, dim=1)
        return scale, shift

    def first(self, features: Tensor) -> Tensor:
        """GN → SiLU, before the 1×1."""
        return F.silu(self.norm_in(features))

    def middle(self, hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """GN·(scale + 1) + shift → SiLU, before the 3×3."""
        return F.silu(self.norm(hidden) * (scale + 1) + shift)

    def last(self, hidden: Tensor) -> Tensor:
        """GN → SiLU, before the scores."""
        return F.silu(self.norm_out(hidden))


def through(conv: nn.Conv2d, gradient: Float[Tensor, "b c2 h w"]) -> Float[Tensor, "b c h w"]:
    """Return the gradient at a convolution's input, given the one at its output; stride 1."""
    return F.conv_transpose2d(gradient, conv.weight, padding=cast(int, conv.padding))


class CriticHeads(nn.Module):
    """The critic's trained part, one head per level. Always in float32: scores are unbounded."""

    def __init__(
        self, level_channels: Sequence[int], *, channels: int, time_embedding_dim: int = 128
    ) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(time_embedding_dim, time_embedding_dim)
        self.heads = nn.ModuleList(
            CriticHead(width, channels, time_embedding_dim) for width in level_channels
        )

    def forward(self, features: Sequence[Tensor], t: Int[Tensor, " b"]) -> list[Tensor]:
        """Return each level's map of scores, shape (b, 1, h_k, w_k).

        Args:
            features: The trunk's levels, shape (b, c_k, h_k, w_k).
            t: The timestep at which the critic looks.
        """
        with torch.autocast(t.device.type, enabled=False):
            time_embedding = self.time_embedding(t)
            return [
                head(level.float(), time_embedding)
                for head, level in zip(self.heads, features, strict=True)
            ]

    def scores_and_slopes(
        self, features: Sequence[Tensor], t: Int[Tensor, " b"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return each level's map of scores and its slope, ∂ΣD_k / ∂n_k; see ``CriticHead``."""
        with torch.autocast(t.device.type, enabled=False):
            time_embedding = self.time_embedding(t)
            pairs = [
                cast(CriticHead, head).scores_and_slopes(level.float(), time_embedding)
                for head, level in zip(self.heads, features, strict=True)
            ]
        return [scores for scores, _ in pairs], [slopes for _, slopes in pairs]


def scores_of_frozen_heads(
    heads: CriticHeads, features: Sequence[Tensor], t: Int[Tensor, " b"]
) -> list[Tensor]:
    """Return the heads' scores; gradient flows to the features, never to the heads."""
    frozen = {name: weight.detach() for name, weight in heads.named_parameters()}
    return torch.func.functional_call(heads, frozen, (features, t))


class Critic(nn.Module):
    """A frozen trunk, and heads on its features.

    Args:
        trunk: The teacher, of which ``encode`` is used. Its weights are frozen and it stays in eval
            mode (every block of the released one has dropout).
        head_channels: Width of the heads.
        normalise_features: Give the heads each level divided by its GroupNorm statistics (no
            affine), so that a gradient penalty means the same on every level and crop size.
    """

    def __init__(self, trunk: KSRUNet, *, head_channels: int, normalise_features: bool) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()
        self.encode = trunk.encode
        self.num_groups = trunk.config.num_groups
        self.normalise_features = normalise_features
        self.heads = CriticHeads(trunk.level_channels, channels=head_channels)

    def train(self, mode: bool = True) -> "Critic":
        """Switch the heads; the trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def features(
        self,
        x_t: Float[Tensor, "b 3 H W"],
        t: Int[Tensor, " b"],
        lowres: Float[Tensor, "b 3 h w"],
    ) -> list[Tensor]:
        """Return the heads' inputs, per level; gradient flows to x_t, never to the trunk."""
        levels = self.encode(x_t, t, lowres).levels
        return self.normalise(levels) if self.normalise_features else list(levels)

    def normalise(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels divided by their GroupNorm statistics, in float32."""
        return [group_norm(level.float(), self.num_groups) for level in levels]
