"""MoVQ by the fast operations: the same encoder and decoder, in fewer passes.

Diffusers' blocks tell a type checker nothing about their parts: they are Any here.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.models.attention_processor import SpatialNorm
from jaxtyping import Float
from torch import Tensor, nn

from ksr_distill.inference.acceleration.operations import (
    Features,
    Norm,
    add,
    apply_norm,
    convolve,
    norm_factors,
)

SCORE_BYTES = 1 << 28
"""Attention scores at once. MoVQ's one head has 1024 channels, which no fused attention serves;
matrix products in bands are several times faster than the fallback."""

Latents = Tensor | None


@torch.no_grad()
def encode(movq: VQModel, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """Return what ``movq.encode(image).latents`` is, to rounding."""
    encoder: Any = movq.encoder
    features = _stem(encoder.conv_in, image)
    for block in encoder.down_blocks:
        features = _level(features, block, None)
        for layer in block.downsamplers or ():
            features = _halved(features, layer.conv)
    features = _middle(features, encoder.mid_block, None)
    return movq.quant_conv(_head(features, encoder.conv_norm_out, encoder.conv_out, None))


@torch.no_grad()
def decode(movq: VQModel, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Return what ``movq.decode(latents, force_not_quantize=True).sample`` is, to rounding."""
    decoder: Any = movq.decoder
    latents = latents.contiguous(memory_format=torch.channels_last)
    features = _stem(decoder.conv_in, movq.post_quant_conv(latents))
    features = _middle(features, decoder.mid_block, latents)
    for block in decoder.up_blocks:
        features = _level(features, block, latents)
        for layer in block.upsamplers or ():
            features = _stored(convolve(features.pixels, layer.conv, doubles=True))
    return _head(features, decoder.conv_norm_out, decoder.conv_out, latents)


def _stem(conv: nn.Conv2d, image: Tensor) -> Features:
    image = image.contiguous(memory_format=torch.channels_last)
    return add(F.conv2d(image, conv.weight, None, padding=1), conv.bias)


def _head(features: Features, norm: Any, conv: nn.Conv2d, latents: Latents) -> Tensor:
    ready = _norm(features, norm, latents, silu=True)
    return conv(apply_norm(features.pixels, ready, in_place=True))


def _level(features: Features, block: Any, latents: Latents) -> Features:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        features = _resnet(features, resnet, latents)
        if attention is not None:
            features = _attend(features, attention, latents)
    return features


def _middle(features: Features, block: Any, latents: Latents) -> Features:
    features = _resnet(features, block.resnets[0], latents)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            features = _attend(features, attention, latents)
        features = _resnet(features, resnet, latents)
    return features


def _resnet(features: Features, block: Any, latents: Latents) -> Features:
    source, projection = features.pixels, block.conv_shortcut
    norm = _norm(features, block.norm1, latents, silu=True)
    rest = source if projection is None else F.conv2d(source, projection.weight)
    hidden = convolve(source, block.conv1, norm, overwrites=projection is not None)
    del features, source
    norm = _norm(hidden, block.norm2, latents, silu=True)
    return convolve(
        hidden.pixels,
        block.conv2,
        norm,
        residual=lambda: rest,
        residual_bias=None if projection is None else projection.bias,
        overwrites=True,
    )


def _halved(features: Features, conv: nn.Conv2d) -> Features:
    """Pad below and to the right, as the released model does, and stride."""
    pixels = F.pad(features.pixels, (0, 1, 0, 1))
    return add(F.conv2d(pixels, conv.weight, None, stride=2), conv.bias)


def _stored(features: Features) -> Features:
    """Return the features with nothing pending: others than a norm read the pixels."""
    if features.pending_bias is None:
        return features
    return add(features.pixels, features.pending_bias)


def _norm(features: Features, norm: Any, latents: Latents, *, silu: bool) -> Norm:
    if not isinstance(norm, SpatialNorm):
        return Norm(norm_factors(features, norm), silu)
    # 1×1 convolutions and the enlargement by repetition commute: both stay at the latents' size.
    weight = torch.cat([norm.conv_y.weight, norm.conv_b.weight])
    bias = torch.cat([cast(Tensor, conv.bias) for conv in (norm.conv_y, norm.conv_b)])
    spatial = F.linear(cast(Tensor, latents).permute(0, 2, 3, 1), weight[:, :, 0, 0], bias)
    return Norm(norm_factors(features, norm.norm_layer), silu, spatial.permute(0, 3, 1, 2))


def _attend(features: Features, attention: Any, latents: Latents) -> Features:
    source = features.pixels
    layer = attention.group_norm if attention.spatial_norm is None else attention.spatial_norm
    norm = _norm(features, layer, latents, silu=False)
    batch, channels, height, width = source.shape
    tokens = apply_norm(source, norm).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    query, key, value = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
    del tokens
    heads = [part.unflatten(2, (attention.heads, -1)) for part in (query, key, value)]
    mixed = torch.stack(
        [mix(*(part[:, :, head] for part in heads), scale=attention.scale)
         for head in range(attention.heads)], dim=2,
    ).flatten(2)  # fmt: skip
    project = attention.to_out[0]
    out = F.linear(mixed, project.weight).reshape(batch, height, width, channels)
    return add(out.permute(0, 3, 1, 2), project.bias, source)


def mix(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b m d"],
    value: Float[Tensor, "b m d"],
    *,
    scale: float,
) -> Float[Tensor, "b n d"]:
    """Return softmax(query keyᵀ·scale) value, a band of queries at a time."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    at_once = max(1, SCORE_BYTES // (query.shape[0] * num_keys * query.element_size()))
    bands = -(-num_queries // at_once)
    at_once = -(-num_queries // bands)
    empty = query.new_empty(1, 1, 1)
    out = torch.empty_like(query)
    for start in range(0, num_queries, at_once):
        band = slice(start, start + at_once)
        scores = torch.baddbmm(empty, query[:, band], key.mT, beta=0, alpha=scale)
        torch.bmm(scores.softmax(-1), value, out=out[:, band])
    return out
