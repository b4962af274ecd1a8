"""The pieces of the super-resolution U-Net (KandiSuperRes, ``unet_sr``)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

Resampling = Literal["none", "down", "up"]
Upsampling = Literal["transposed_conv", "nearest_conv"]


def sinusoidal_embedding(t: Real[Tensor, " b"], dim: int) -> Float[Tensor, "b {dim}"]:
    """Return sines, then cosines, of t at dim/2 frequencies, in float32 whatever t's dtype.

    In bfloat16 t = 979 becomes 976 and the embedding is 45 % off in L2; so both t and the result
    stay in float32. Frequencies are exp(-ln(10000)·i / (dim/2 - 1)), as in the released model.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoid, Linear, SiLU, Linear: computed in float32, whatever autocast says."""

    def __init__(self, sinusoid_dim: int, dim: int) -> None:
        super().__init__()
        self.sinusoid_dim = sinusoid_dim
        self.linear_1 = nn.Linear(sinusoid_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Real[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return the embedding in the weights' dtype."""
        with torch.autocast(t.device.type, enabled=False):
            hidden = sinusoidal_embedding(t, self.sinusoid_dim)
            hidden = F.linear(hidden, self.linear_1.weight.float(), self.linear_1.bias.float())
            hidden = F.linear(
                F.silu(hidden), self.linear_2.weight.float(), self.linear_2.bias.float()
            )
        return hidden.to(self.linear_1.weight.dtype)


class NearestConv(nn.Module):
    """Double the size by repeating pixels, then a 3×3 convolution: no checkerboard by design."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Return the enlarged features (H = 2h, W = 2w)."""
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def resampler(channels: int, resampling: Resampling, upsampling: Upsampling) -> nn.Module | None:
    """Return the layer that halves or doubles the size, or None."""
    if resampling == "none":
        return None
    if resampling == "down":
        return nn.Conv2d(channels, channels, 4, stride=2, padding=1)
    if upsampling == "nearest_conv":
        return NearestConv(channels)
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class ResNetBlock(nn.Module):
    """Two convolutions, the second one steered by time, beside a shortcut.

    main:      GroupNorm → [resample] → 3×3
               → GroupNorm → ·(scale + 1) + shift → SiLU → dropout → 3×3
    shortcut:  [resample] → [1×1 where channels or resolution change]

    The first half has no activation: the released model is like that, and its weights need it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_embedding_dim: int,
        num_groups: int,
        dropout: float = 0.0,
        resampling: Resampling = "none",
        upsampling: Upsampling = "transposed_conv",
    ) -> None:
        super().__init__()
        self.time_projection = nn.Linear(time_embedding_dim, 2 * out_channels)
        self.norm_1 = nn.GroupNorm(num_groups, in_channels)
        self.resample_main = resampler(in_channels, resampling, upsampling)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.resample_shortcut = resampler(in_channels, resampling, upsampling)
        changes = in_channels != out_channels or resampling != "none"
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(
        self, hidden: Float[Tensor, "b c h w"], time_embedding: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the block's features, resampled and with new channels where it says so."""
        scale_shift = self.time_projection(F.silu(time_embedding))[:, :, None, None]
        scale, shift = scale_shift.chunk(2, dim=1)
        main = self.norm_1(hidden)
        if self.resample_main is not None:
            main = self.resample_main(main)
        main = self.norm_2(self.conv_1(main)) * (scale + 1) + shift
        main = self.conv_2(self.dropout(F.silu(main)))
        if self.resample_shortcut is not None:
            hidden = self.resample_shortcut(hidden)
        return main + (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden))
