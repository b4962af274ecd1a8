"""Configs inferred from the shapes of a released state dict, so that models of any size convert.

What shapes do not determine follows a rule that gives the released models' value, and can be passed
instead.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from typing import Any

from ksr_distill.models.movq import MOVQ_CONFIG

Shapes = Mapping[str, Sequence[int]]


def sr_unet_config(shapes: Shapes, *, num_groups: int | None = None) -> dict[str, Any]:
    """Return KSRUNet's config.

    Args:
        num_groups: Leaves no trace in the shapes. None takes a quarter of the base channels, at
            most 32: the released 32 for 128, and 8 for 32.
    """
    stem = _size(shapes, "init_conv.weight", 0)
    blocks = _counts(shapes, r"down_samples\.(\d+)\.resnet_attn_blocks\.(\d+)\.")
    out = "down_samples.{}.resnet_attn_blocks.0.0.out_block.projection.weight"
    widths = [_size(shapes, out.format(level), 0) for level in range(len(blocks))]
    base = gcd(*widths)
    if num_groups is None:
        num_groups = gcd(max(1, min(32, base // 4)), stem, *widths)
    return {
        "base_channels": base,
        "stem_channels": None if stem == base else stem,
        "channel_multipliers": [width // base for width in widths],
        "num_blocks": blocks,
        "time_embedding_dim": _size(shapes, "to_time_embed.1.weight", 0),
        "num_groups": num_groups,
    }


def refiner_config(
    shapes: Shapes, *, num_groups: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Return RefinerUNet's config.

    Args:
        num_groups: Leaves no trace in the shapes. None takes the released 32, or its largest
            divisor that divides every normalised width.
        head_dim: Likewise, with the released 64 and the attentions' widths.
    """
    blocks = _counts(shapes, r"down_samples\.(\d+)\.resnet_attn_blocks\.(\d+)\.")
    out = "down_samples.{}.resnet_attn_blocks.0.2.resnet_blocks.3.projection.weight"
    normalised = _sizes(shapes, r"norm\.context_mlp\.1\.bias$")
    context_dim = _size(shapes, "feature_pooling.attention.to_key.weight", 1)
    return {
        "in_channels": _size(shapes, "in_layer.weight", 1),
        "time_embedding_dim": _size(shapes, "to_time_embed.1.weight", 0),
        "groups": num_groups or gcd(32, *(size // 2 for size in normalised)),
        "attention_head_dim": head_dim or gcd(64, *_sizes(shapes, r"\.to_query\.weight$")),
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "block_out_channels": [_size(shapes, out.format(i), 0) for i in range(len(blocks))],
        "cross_attention_dim": context_dim,
        "encoder_hid_dim": context_dim,
    }


def movq_config(shapes: Shapes, *, num_groups: int | None = None) -> dict[str, Any]:
    """Return VQModel's config.

    Args:
        num_groups: Leaves no trace in the shapes. None takes the released 32, or its largest
            divisor that divides every width.
    """
    blocks = _counts(shapes, r"encoder\.down\.(\d+)\.block\.(\d+)\.")
    levels = range(len(blocks))
    widths = [_size(shapes, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in levels]
    has_attention = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in levels]
    down = [("Attn" if attends else "") + "DownEncoderBlock2D" for attends in has_attention]
    up = [("Attn" if attends else "") + "UpDecoderBlock2D" for attends in has_attention]
    return MOVQ_CONFIG | {
        "in_channels": _size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _size(shapes, "encoder.conv_out.weight", 0),
        "vq_embed_dim": _size(shapes, "quant_conv.weight", 0),
        "layers_per_block": blocks[0],
        "norm_num_groups": num_groups or gcd(32, *widths),
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up[::-1],
    }


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"{name} is missing, which the config is read from")
    if len(shape) <= axis or shape[axis] < 1:
        raise ValueError(f"{name} has the shape {tuple(shape)}, which no config gives")
    return shape[axis]


def _sizes(shapes: Shapes, pattern: str) -> Iterable[int]:
    return [_size(shapes, name, 0) for name in shapes if re.search(pattern, name)]


def _counts(shapes: Shapes, pattern: str) -> list[int]:
    """Return the number of blocks of each level, from names with a level and a block index."""
    found = {match.groups() for name in shapes if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(f"no name matches {pattern}, which the config is read from")
    levels = sorted({int(level) for level, _ in found})
    if levels != list(range(len(levels))):
        raise ValueError(f"the levels of {pattern} are {levels[:8]}, not 0, 1, …")
    return [sum(int(level) == i for level, _ in found) for i in levels]
