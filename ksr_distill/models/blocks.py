"""The pieces of the super-resolution U-Net (KandiSuperRes, ``unet_sr``)."""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from ksr_distill.models.norms import GroupNorm

Resampling = Literal["none", "down", "up"]
Upsampling = Literal["transposed_conv", "nearest"]


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
        self.linear_1 = LinearInFloat32(sinusoid_dim, dim)
        self.linear_2 = LinearInFloat32(dim, dim)

    def forward(self, t: Real[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return the embedding in the weights' dtype."""
        with torch.autocast(t.device.type, enabled=False):
            hidden = self.linear_1(sinusoidal_embedding(t, self.sinusoid_dim))
            hidden = self.linear_2(F.silu(hidden))
        return hidden.to(self.linear_1.weight.dtype)


class LinearInFloat32(nn.Linear):
    """Computes in float32, whatever the weights' dtype."""

    def forward(self, hidden: Float[Tensor, "b c"]) -> Float[Tensor, "b c2"]:
        """Return the float32 result."""
        return F.linear(hidden, self.weight.float(), self.bias.float())


class Enlarge(nn.Module):
    """Double the size by repeating pixels."""

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Return the repeated pixels (H = 2h, W = 2w)."""
        return F.interpolate(hidden, scale_factor=2.0, mode="nearest")


class ConvOfEnlarged(nn.Conv2d):
    """A 3×3 convolution of its input at double size, computed without the enlarged map."""

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 H W"]:
        """Return ``conv(Enlarge()(hidden))`` with this layer's weights."""
        weight = kernels_of_enlarged(self.weight)
        bias = cast(Tensor, self.bias).repeat_interleave(4)
        return F.pixel_shuffle(F.conv2d(hidden, weight, bias, padding=1), 2)


def kernels_of_enlarged(weight: Float[Tensor, "c2 c 3 3"]) -> Float[Tensor, "4*c2 c 3 3"]:
    """Return four kernels on the small map, one for each place of a 2×2 cell of the large one.

    They are in pixel_shuffle's order. In an even row or column the last two of three taps fall on
    the same repeated pixel, in an odd one the first two; such taps are added.
    """
    first, centre, last = weight.unbind(dim=2)
    none = torch.zeros_like(first)
    rows = ((first, centre + last, none), (none, first + centre, last))
    kernels = []
    for row in rows:
        left, middle, right = torch.stack(row, dim=2).unbind(dim=3)
        none = torch.zeros_like(left)
        kernels.append(torch.stack([left, middle + right, none], dim=3))
        kernels.append(torch.stack([none, left + middle, right], dim=3))
    return torch.stack(kernels, dim=1).flatten(0, 1)


def resampler(channels: int, resampling: Resampling, upsampling: Upsampling) -> nn.Module | None:
    """Return the layer that halves or doubles the size, or None."""
    if resampling == "none":
        return None
    if resampling == "down":
        return nn.Conv2d(channels, channels, 4, stride=2, padding=1)
    if upsampling == "nearest":
        return Enlarge()
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class ResNetBlock(nn.Module):
    """Two convolutions with a shortcut; the timestep modulates the second one's input.

    main:      GroupNorm → [resample] → 3×3
               → GroupNorm → ·(scale + 1) + shift → SiLU → dropout → 3×3
    shortcut:  [resample] → [1×1 where channels or resolution change]

    There is no activation before the first convolution, as in the released model.
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
        self.norm_1 = GroupNorm(num_groups, in_channels)
        self.resample_main = resampler(in_channels, resampling, upsampling)
        enlarges = isinstance(self.resample_main, Enlarge)
        first_conv = ConvOfEnlarged if enlarges else nn.Conv2d
        self.conv_1 = first_conv(in_channels, out_channels, 3, padding=1)
        self.norm_2 = GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.resample_shortcut = resampler(in_channels, resampling, upsampling)
        changes = in_channels != out_channels or resampling != "none"
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(
        self, hidden: Float[Tensor, "b c h w"], time_embedding: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the block's output."""
        scale_shift = self.time_projection(F.silu(time_embedding))[:, :, None, None]
        scale, shift = scale_shift.chunk(2, dim=1)
        main = self.norm_1(hidden)
        if not (self.resample_main is None or isinstance(self.conv_1, ConvOfEnlarged)):
            main = self.resample_main(main)
        main = self.activated(self.conv_1(main), scale, shift)
        return self.conv_2(self.dropout(main)) + self.shortcut(hidden)

    def activated(
        self, main: Float[Tensor, "b c h w"], scale: Tensor, shift: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """Return GroupNorm → ·(scale + 1) + shift → SiLU: the input of the second convolution."""
        return F.silu(self.norm_2(main) * (scale + 1) + shift)

    def shortcut(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the block's input, resampled and projected to the output's channels."""
        if isinstance(self.resample_shortcut, Enlarge):  # repeating and 1×1 commute
            return self.resample_shortcut(cast(nn.Conv2d, self.conv_shortcut)(hidden))
        if self.resample_shortcut is not None:
            hidden = self.resample_shortcut(hidden)
        return hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
