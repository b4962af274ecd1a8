"""The critic (the paper's discriminator): the teacher's frozen downward half, and trained heads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ksr_distill.models.blocks import TimeEmbedding
from ksr_distill.models.norms import GroupNorm, group_norm
from ksr_distill.models.unet import KSRUNet

HEAD_GROUPS = 8


class CriticHead(nn.Module):
    """One level's features in, a map of scores out.

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
        hidden = self.conv_in(F.silu(self.norm_in(features)))
        scale_shift = self.time_projection(F.silu(time_embedding))[:, :, None, None]
        scale, shift = scale_shift.chunk(2, dim=1)
        hidden = hidden + self.conv(F.silu(self.norm(hidden) * (scale + 1) + shift))
        return self.conv_out(F.silu(self.norm_out(hidden)))


class CriticHeads(nn.Module):
    """The critic's trained part: a head per level. Always float32: scores have no bound."""

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


def judge(heads: CriticHeads, features: Sequence[Tensor], t: Int[Tensor, " b"]) -> list[Tensor]:
    """Return the heads' scores; gradient flows to the features, never to the heads."""
    frozen = {name: weight.detach() for name, weight in heads.named_parameters()}
    return torch.func.functional_call(heads, frozen, (features, t))


class Critic(nn.Module):
    """Frozen trunk and heads.

    Args:
        trunk: The teacher. Its ``encode`` is called as it is; its weights never move and it stays
            in eval mode (dropout sits in every block of the released one).
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
        """Return what the heads read, per level; gradient flows to x_t, never to the trunk."""
        levels = self.encode(x_t, t, lowres).levels
        return self.normalise(levels) if self.normalise_features else list(levels)

    def normalise(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels divided by their GroupNorm statistics, in float32."""
        return [group_norm(level.float(), self.num_groups) for level in levels]
