"""The refiner's U-Net by the fast operations, with one token of context.

Diffusers' blocks tell a type checker nothing about their parts: they are Any here.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_kandinsky3 import (
    Kandinsky3DownSampleBlock,
    Kandinsky3UNetOutput,
    Kandinsky3UpSampleBlock,
)
from jaxtyping import Float, Real, Shaped
from torch import Tensor, nn

from ksr_distill.inference.acceleration.operations import (
    Features,
    Norm,
    add,
    apply_norm,
    convolve,
    norm_factors,
)
from ksr_distill.inference.acceleration.unet import concatenated
from ksr_distill.models.refiner import RefinerUNet


@torch.no_grad()
def refiner_forward(
    refiner: RefinerUNet,
    sample: Float[Tensor, "b c h w"],
    timestep: Real[Tensor, " b"],
    encoder_hidden_states: Float[Tensor, "b n d"],
    encoder_attention_mask: Shaped[Tensor, "b n"] | None = None,
) -> Kandinsky3UNetOutput:
    """Return what ``refiner(sample, timestep, encoder_hidden_states)`` returns, to rounding.

    Args:
        encoder_hidden_states: One token, the same for all samples. Its softmax is 1, so that each
            cross-attention adds one vector to all places: no queries, no keys, no norm before.
        encoder_attention_mask: None; a single token is always kept.
    """
    token = encoder_hidden_states
    if token.shape[1] != 1 or encoder_attention_mask is not None:
        raise ValueError(
            f"the fast refiner takes one token and no mask, not {token.shape[1]}; use restore()"
        )
    keep = torch.zeros_like(token[:, None, :, 0])
    time = refiner.time_embedding(refiner.time_proj(timestep).to(sample.dtype))
    time = F.silu(refiner.add_time_condition(time, token, keep))
    sample = sample.contiguous(memory_format=torch.channels_last)
    features = add(F.conv2d(sample, refiner.conv_in.weight, None, padding=1), refiner.conv_in.bias)
    skips = []
    for level in refiner.down_blocks:
        features = _level(features, level, time, token)
        skips.append(features)
    skips.pop()
    for i, level in enumerate(refiner.up_blocks):
        if i > 0:
            features = concatenated(features, skips.pop())
        features = _level(features, level, time, token)
    norm = Norm(norm_factors(features, refiner.conv_norm_out), silu=True)
    return Kandinsky3UNetOutput(sample=refiner.conv_out(apply_norm(features.pixels, norm)))


def _level(
    features: Features,
    level: Any,
    time: Tensor,
    token: Tensor,
) -> Features:
    attends_first = level.self_attention and isinstance(level, Kandinsky3DownSampleBlock)
    attends_last = level.self_attention and isinstance(level, Kandinsky3UpSampleBlock)
    if attends_first:
        features = _attention_block(features, level.attentions[0], time, None)
    rest = zip(level.resnets_in, level.attentions[1:], level.resnets_out, strict=True)
    for resnet_in, attention, resnet_out in rest:
        features = _resnet(features, resnet_in, time)
        if level.context_dim is not None:
            features = _attention_block(features, attention, time, token)
        features = _resnet(features, resnet_out, time)
    if attends_last:
        features = _attention_block(features, level.attentions[0], time, None)
    return features


def _norm(features: Features, norm: Any, time: Tensor, *, silu: bool) -> Norm:
    """Return a conditional norm; ``time`` has had the SiLU that all of them share."""
    return Norm(norm_factors(features, norm.norm, norm.context_mlp[1](time)), silu)


def _resnet(features: Features, resnet: Any, time: Tensor) -> Features:
    rest = resnet.shortcut_up_sample(features.pixels)
    rest = resnet.shortcut_down_sample(resnet.shortcut_projection(rest))
    *blocks, last = resnet.resnet_blocks
    for block in blocks:
        features = _block(features, block, time, None)
    return _block(features, last, time, rest)


def _block(features: Features, block: Any, time: Tensor, residual: Tensor | None) -> Features:
    norm: Norm | None = _norm(features, block.group_norm, time, silu=True)
    pixels = features.pixels
    if not isinstance(block.up_sample, nn.Identity):
        pixels, norm = block.up_sample(apply_norm(pixels, cast(Norm, norm))), None
    add_rest = None if residual is None else lambda: cast(Tensor, residual)
    features = convolve(pixels, block.projection, norm, residual=add_rest)
    if isinstance(block.down_sample, nn.Identity):
        return features
    if features.pending_bias is not None:
        features = add(features.pixels, features.pending_bias)
    return convolve(features.pixels, block.down_sample)


def _attention_block(
    features: Features, block: Any, time: Tensor, token: Tensor | None
) -> Features:
    attention, source = block.attention, features.pixels
    if token is None:
        norm = _norm(features, block.in_norm, time, silu=False)
        features = add(_self_attention(attention, apply_norm(source, norm)), None, source)
    else:
        vector = attention.to_out[0](attention.to_v(token[:1, 0]))[0]
        features = add(source, vector)
    source = features.pixels
    norm = _norm(features, block.out_norm, time, silu=False)
    widen, _, narrow = block.feed_forward
    hidden = F.silu(F.conv2d(apply_norm(source, norm), widen.weight), inplace=True)
    return add(F.conv2d(hidden, narrow.weight), None, source)


def _self_attention(attention: Any, pixels: Tensor) -> Tensor:
    batch, channels, height, width = pixels.shape
    tokens = pixels.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    query, key, value = (
        layer(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    mixed = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    return mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
