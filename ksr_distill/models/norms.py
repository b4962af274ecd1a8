"""Group norm that is fast for channels-last images, when compiled and on its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``; where it is faster, the statistics are taken channel by channel."""

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the features with mean 0 and variance 1 in each group, then scaled and shifted."""
        return group_norm(hidden, self.num_groups, self.weight, self.bias, eps=self.eps)


def group_norm(
    hidden: Float[Tensor, "b c h w"],
    num_groups: int,
    weight: Float[Tensor, " c"] | None = None,
    bias: Float[Tensor, " c"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "b c h w"]:
    """Return ``F.group_norm``, by PyTorch's own kernel or by channels.

    In channels-last images the few channels of a group are adjacent in each pixel. A reduction over
    one group reads every pixel for only 4 to 16 bytes of it; a reduction over all channels at once
    reads each pixel once. Measured on an H200 with torch 2.11: PyTorch's kernel runs at 0.03 TB/s
    on channels-last images, and in the compiled training of a 7 M U-Net the kernels of an update
    take 15.3 ms instead of 19.2.
    """
    if torch.compiler.is_compiling() or _is_slow_for_the_kernel(hidden):
        return group_norm_by_channels(hidden, num_groups, weight, bias, eps=eps)
    return F.group_norm(hidden, num_groups, weight, bias, eps)


def _is_slow_for_the_kernel(hidden: Tensor) -> bool:
    is_channels_last = hidden.is_contiguous(memory_format=torch.channels_last)
    return hidden.is_cuda and is_channels_last and not hidden.is_contiguous()


def group_norm_by_channels(
    hidden: Float[Tensor, "b c h w"],
    num_groups: int,
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    *,
    eps: float,
) -> Float[Tensor, "b c h w"]:
    """Return the same in float32 steps: means and variances of channels, pooled by group.

    The variance of a group is the mean of its channels' variances plus the variance of their means.
    """
    pixels = hidden.float()
    variance, mean = torch.var_mean(pixels, dim=(2, 3), correction=0)
    shape = mean.shape
    mean, variance = (each.unflatten(1, (num_groups, -1)) for each in (mean, variance))
    group_mean = mean.mean(2, keepdim=True)
    group_variance = (variance + (mean - group_mean).square()).mean(2, keepdim=True)
    factor = (group_variance + eps).rsqrt().expand_as(mean).reshape(shape)
    offset = -group_mean.expand_as(mean).reshape(shape) * factor
    if weight is not None:
        factor, offset = factor * weight, offset * weight
    if bias is not None:
        offset = offset + bias
    output = pixels * factor[:, :, None, None] + offset[:, :, None, None]
    # Autocast keeps norms in float32; without it the type stays that of the input.
    return output if torch.is_autocast_enabled(hidden.device.type) else output.to(hidden.dtype)
