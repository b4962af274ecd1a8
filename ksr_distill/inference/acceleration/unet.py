"""The super-resolution U-Net by the fast operations: the same function, in fewer passes."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from ksr_distill.inference.acceleration.operations import (
    Features,
    Norm,
    add,
    apply_norm,
    convolve,
    norm_factors,
    with_sums,
)
from ksr_distill.models.blocks import Enlarge, ResNetBlock
from ksr_distill.models.unet import KSRUNet, enlarge


@torch.no_grad()
def unet_forward(
    unet: KSRUNet,
    x_t: Float[Tensor, "b 3 H W"],
    t: Real[Tensor, " b"],
    lowres: Float[Tensor, "b 3 h w"],
) -> Float[Tensor, "b 3 H W"]:
    """Return what ``unet(x_t, t, lowres)`` returns, to rounding."""
    unet._check_size(x_t)
    dtype = unet.conv_in.weight.dtype
    conditioned = torch.cat([x_t, enlarge(lowres, x_t).to(x_t.dtype)], dim=1).to(dtype)
    conditioned = conditioned.contiguous(memory_format=torch.channels_last)
    hidden = F.conv2d(conditioned, unet.conv_in.weight, None, padding=1)
    features = add(hidden, unet.conv_in.bias)
    del hidden
    activated_time = F.silu(unet.time_embedding(t).to(dtype))
    skips = []
    for level in unet.down_levels:
        for block in cast(nn.ModuleList, level):
            features = block_forward(cast(ResNetBlock, block), features, activated_time)
        skips.append(features)
    skips.pop()
    for i, level in enumerate(unet.up_levels):
        if i > 0:
            features = concatenated(features, skips.pop())
        for block in cast(nn.ModuleList, level):
            features = block_forward(cast(ResNetBlock, block), features, activated_time)
    norm = Norm(norm_factors(features, unet.norm_out), silu=True)
    output = unet.conv_out(apply_norm(features.pixels, norm, in_place=True))
    if unet.config.predict_residual:
        return output.float() + enlarge(lowres.float(), output)
    return output


def block_forward(
    block: ResNetBlock, features: Features, activated_time: Float[Tensor, "b d"]
) -> Features:
    """Return a block's features, with the sums of its output.

    Args:
        activated_time: SiLU of the time embedding.
    """
    scale_shift = block.time_projection(activated_time)
    source = features.pixels
    main: Tensor = source
    norm = Norm(norm_factors(features, block.norm_1))
    del features
    if block.resample_main is None or isinstance(block.resample_main, Enlarge):
        doubles = block.resample_main is not None
        hidden = convolve(main, block.conv_1, norm, doubles=doubles)
    else:
        main = block.resample_main(apply_norm(main, norm))
        hidden = convolve(main, block.conv_1)
    del main
    norm = Norm(norm_factors(hidden, block.norm_2, scale_shift), silu=True)
    weight, bias = shortcut_weights(block)
    return convolve(
        hidden.pixels,
        block.conv_2,
        norm,
        residual=lambda: shortcut(block, source, weight),
        residual_bias=bias,
        overwrites=True,
    )


def shortcut_weights(block: ResNetBlock) -> tuple[Tensor | None, Tensor | None]:
    """Return the shortcut's two convolutions as one, where one is cheaper, and its bias.

    A transposed 4×4 convolution and the 1×1 after it are one transposed convolution; a strided one
    too, but with more operations where the 1×1 widens.
    """
    resample, project = block.resample_shortcut, block.conv_shortcut
    if project is None:
        return None, None
    if isinstance(resample, nn.ConvTranspose2d) and project.out_channels <= project.in_channels:
        weight = torch.einsum("imyx,om->ioyx", resample.weight, project.weight[:, :, 0, 0])
    elif isinstance(resample, nn.Conv2d) and project.out_channels <= project.in_channels:
        weight = torch.einsum("miyx,om->oiyx", resample.weight, project.weight[:, :, 0, 0])
    else:
        return None, project.bias
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, F.linear(cast(Tensor, resample.bias), project.weight[:, :, 0, 0], project.bias)


def shortcut(block: ResNetBlock, source: Tensor, weight: Tensor | None) -> Tensor:
    """Return what is added to the main path, without its last bias."""
    resample, project = block.resample_shortcut, block.conv_shortcut
    if weight is not None and isinstance(resample, nn.ConvTranspose2d):
        return F.conv_transpose2d(source, weight, None, stride=2, padding=1)
    if weight is not None:
        return F.conv2d(source, weight, None, stride=2, padding=1)
    if isinstance(resample, Enlarge):  # repeating and 1×1 commute
        return resample(F.conv2d(source, cast(nn.Conv2d, project).weight))
    if resample is not None:
        source = resample(source)
    return source if project is None else F.conv2d(source, project.weight)


def concatenated(one: Features, other: Features) -> Features:
    """Return two pictures' channels one after the other, with the sums of both."""
    pixels = torch.cat([one.pixels, other.pixels], dim=1)
    if one.sums is None or other.sums is None:
        return with_sums(pixels)
    sums = [sums.sum(1, keepdim=True) for sums in (one.sums, other.sums)]
    return Features(pixels, torch.cat(sums, dim=3))
