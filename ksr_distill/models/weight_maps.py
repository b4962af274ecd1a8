"""The released name of each of our parameters, by a list of rules for each network.

Conversion looks up the released name of our parameters in both directions.

Sources: ai-forever/KandiSuperRes (Apache-2.0) and diffusers; every name of the full-size models is
checked by the tests.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_INDEX = "#"


class Rule(NamedTuple):
    """One fragment of a name in both namings.

    Attributes:
        released: The released fragment, with the same number of ``#`` as ours.
        ours: Ours. ``#`` is an index, a leading ``^`` the start of the name.
        only: What a name must start with for the rule to apply.
        shift: Our first index minus the released one.
        mirror: The sum of our first index and the released one, where they count down and up.
    """

    released: str
    ours: str
    only: str = ""
    shift: int = 0
    mirror: int | None = None


class WeightMap:
    """Gives our parameters their released names, and reshapes the few that are stored otherwise.

    Args:
        rules: Applied one after another, in this order.
        linear_from_conv: Our names that are linear layers where the released file has 1×1
            convolutions.
    """

    def __init__(self, rules: list[Rule], linear_from_conv: re.Pattern[str] | None = None) -> None:
        self._to_released = [_substitution(rule) for rule in rules]
        self._linear_from_conv = linear_from_conv

    def to_released(self, our_name: str) -> str:
        """Return the released name of a parameter of ours."""
        for substitute in self._to_released:
            our_name = substitute(our_name)
        return our_name

    def tensor_to_ours(self, our_name: str, value: Tensor) -> Tensor:
        """Return the parameter in our shape."""
        return value[:, :, 0, 0] if self._is_linear(our_name) else value

    def tensor_to_released(self, our_name: str, value: Tensor) -> Tensor:
        """Return the parameter in the released shape."""
        return value[:, :, None, None] if self._is_linear(our_name) else value

    def _is_linear(self, our_name: str) -> bool:
        return bool(self._linear_from_conv and self._linear_from_conv.search(our_name))


def _substitution(rule: Rule) -> Callable[[str], str]:
    start = "^" if rule.ours.startswith("^") else ""
    ours = re.escape(rule.ours.lstrip("^")).replace(re.escape(_INDEX), r"(\d+)")
    pattern = re.compile(start + ours)
    released = rule.released.lstrip("^")

    def rename(match: re.Match[str]) -> str:
        indices = [int(index) for index in match.groups()]
        if indices:
            moved = indices[0] - rule.shift
            indices[0] = moved if rule.mirror is None else rule.mirror - indices[0]
        return released.replace(_INDEX, "{}").format(*indices)

    def substitute(name: str) -> str:
        return pattern.sub(rename, name, count=1) if name.startswith(rule.only) else name

    return substitute


_BLOCK = ".resnet_attn_blocks.#"

SR_UNET_MAP = WeightMap(
    [
        Rule("^to_time_embed.1.", "^time_embedding.linear_1."),
        Rule("^to_time_embed.3.", "^time_embedding.linear_2."),
        Rule("^init_conv.", "^conv_in."),
        Rule("^norm.", "^norm_out."),
        Rule("^out_conv.", "^conv_out."),
        Rule(f"^down_samples.#{_BLOCK}.0.", "^down_levels.#.#."),
        Rule(f"^up_samples.#{_BLOCK}.0.", "^up_levels.#.#."),
        Rule(".time_mlp.1.", ".time_projection."),
        Rule(".in_block.group_norm.", ".norm_1."),
        Rule(".in_block.change_resolution.change_resolution.", ".resample_main."),
        Rule(".in_block.projection.", ".conv_1."),
        Rule(".out_block.group_norm.", ".norm_2."),
        Rule(".out_block.projection.", ".conv_2."),
        Rule(".change_resolution.change_resolution.", ".resample_shortcut."),
        Rule(".res_block.", ".conv_shortcut."),
    ]
)
"""KandiSuperRes' U-Net ↔ KSRUNet."""

REFINER_MAP = WeightMap(
    [
        Rule("^to_time_embed.1.", "^time_embedding.linear_1."),
        Rule("^to_time_embed.3.", "^time_embedding.linear_2."),
        Rule("^feature_pooling.", "^add_time_condition."),
        Rule("^in_layer.", "^conv_in."),
        Rule("^out_layer.0.", "^conv_norm_out."),
        Rule("^out_layer.2.", "^conv_out."),
        Rule("^down_samples.", "^down_blocks."),
        Rule("^up_samples.", "^up_blocks."),
        Rule(".self_attention_block.", ".attentions.0."),
        Rule(f"{_BLOCK}.0.", ".resnets_in.#."),
        Rule(f"{_BLOCK}.1.", ".attentions.#.", shift=1),
        Rule(f"{_BLOCK}.2.", ".resnets_out.#."),
        Rule(".to_query.", ".to_q."),
        Rule(".to_key.", ".to_k."),
        Rule(".to_value.", ".to_v."),
        Rule(".output_layer.", ".to_out.0."),
    ]
)
"""Kandinsky 3.0 Flash's U-Net ↔ diffusers' Kandinsky3UNet. Our attention 0 is the level's own."""


def movq_map(num_levels: int) -> WeightMap:
    """Return MoVQ ↔ diffusers' VQModel; the decoder's levels are counted from the other end."""
    deepest = num_levels - 1
    return WeightMap(
        [
            Rule("^encoder.down.#.block.#.", "^encoder.down_blocks.#.resnets.#."),
            Rule("^encoder.down.#.attn.#.", "^encoder.down_blocks.#.attentions.#."),
            Rule("^encoder.down.#.downsample.", "^encoder.down_blocks.#.downsamplers.0."),
            Rule("^decoder.up.#.block.#.", "^decoder.up_blocks.#.resnets.#.", mirror=deepest),
            Rule("^decoder.up.#.attn.#.", "^decoder.up_blocks.#.attentions.#.", mirror=deepest),
            Rule("^decoder.up.#.upsample.", "^decoder.up_blocks.#.upsamplers.0.", mirror=deepest),
            Rule(".mid.block_1.", ".mid_block.resnets.0."),
            Rule(".mid.block_2.", ".mid_block.resnets.1."),
            Rule(".mid.attn_1.", ".mid_block.attentions.0."),
            Rule(".norm1.norm_layer.", ".norm1.", only="encoder."),
            Rule(".norm2.norm_layer.", ".norm2.", only="encoder."),
            Rule(".norm_out.norm_layer.", ".conv_norm_out.", only="encoder."),
            Rule(".norm_out.", ".conv_norm_out.", only="decoder."),
            Rule(".norm.norm_layer.", ".group_norm.", only="encoder."),
            Rule(".norm.", ".spatial_norm.", only="decoder."),
            Rule(".nin_shortcut.", ".conv_shortcut."),
            Rule(".q.", ".to_q."),
            Rule(".k.", ".to_k."),
            Rule(".v.", ".to_v."),
            Rule(".proj_out.", ".to_out.0."),
        ],
        linear_from_conv=re.compile(r"\.to_(q|k|v|out\.0)\.weight$"),
    )
