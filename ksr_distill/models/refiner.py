"""The refiner's network (Kandinsky 3.0 Flash), and its fixed empty prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, Kandinsky3UNet, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_kandinsky3 import (
    Kandinsky3DownSampleBlock,
    Kandinsky3UNetOutput,
    Kandinsky3UpSampleBlock,
)
from jaxtyping import Float, Real, Shaped
from torch import Tensor, nn


class RefinerUNet(Kandinsky3UNet):
    """Diffusers' Kandinsky 3 U-Net for contexts that are projected already; predicts eps.

    The released file holds no text projection, so ``encoder_hid_proj`` is an identity. Diffusers
    hard-wires four levels of one depth; here any number of levels and a depth for each will do.
    With the defaults, parameters and outputs are those of the parent class.

    Args:
        layers_per_block: Blocks of each level, or one number for all.
        encoder_hid_dim: Kept because diffusers writes it into config.json and warns where a class
            does not know it; nothing is built from it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        time_embedding_dim: int = 1536,
        groups: int = 32,
        attention_head_dim: int = 64,
        layers_per_block: int | Sequence[int] = 3,
        block_out_channels: Sequence[int] = (384, 768, 1536, 3072),
        cross_attention_dim: int = 4096,
        encoder_hid_dim: int = 4096,
    ) -> None:
        # The parent builds stem and head; its levels (here only the first) are replaced below.
        super().__init__(
            in_channels=in_channels,
            time_embedding_dim=time_embedding_dim,
            groups=groups,
            attention_head_dim=attention_head_dim,
            layers_per_block=1,
            block_out_channels=tuple(block_out_channels[:1]),
            cross_attention_dim=cross_attention_dim,
            encoder_hid_dim=encoder_hid_dim,
        )
        self.register_to_config(
            layers_per_block=layers_per_block, block_out_channels=block_out_channels
        )
        self.encoder_hid_proj = nn.Identity()
        self.num_levels = len(block_out_channels)
        self._build_levels()

    @property
    def stride(self) -> int:
        """Both sides of the latents must be multiples of this."""
        return 2 ** (self.num_levels - 1)

    def forward(
        self,
        sample: Float[Tensor, "b c h w"],
        timestep: Real[Tensor, "..."] | float,
        encoder_hidden_states: Float[Tensor, "b n d"] | None = None,
        encoder_attention_mask: Shaped[Tensor, "b n"] | None = None,
        return_dict: bool = True,
    ) -> Kandinsky3UNetOutput | tuple[Tensor]:
        """Return the noise in ``sample``.

        Args:
            encoder_hidden_states: Projected context; required (the parent's signature has a None).
            encoder_attention_mask: 1 or True keeps a token. None keeps all.
        """
        if encoder_hidden_states is None:
            raise ValueError(
                "encoder_hidden_states is None, but the refiner is always conditioned; "
                "pass RefinerContext.tokens"
            )
        if encoder_attention_mask is None:
            encoder_attention_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2])
        return super().forward(
            sample, timestep, encoder_hidden_states, encoder_attention_mask, return_dict
        )

    def _build_levels(self) -> None:
        config = self.config
        counts = config.layers_per_block
        counts = [counts] * self.num_levels if isinstance(counts, int) else list(counts)
        if len(counts) != self.num_levels:
            raise ValueError(
                f"layers_per_block={counts} has {len(counts)} levels and block_out_channels "
                f"{self.num_levels}; give both one entry for each level"
            )
        widths = [config.block_out_channels[0] // 2, *config.block_out_channels]
        deepest = self.num_levels - 1
        self.down_blocks = nn.ModuleList(
            Kandinsky3DownSampleBlock(
                widths[i],
                widths[i + 1],
                **self._level_options(i, counts[i]),
                down_sample=i < deepest,
            )
            for i in range(self.num_levels)
        )
        self.up_blocks = nn.ModuleList(
            Kandinsky3UpSampleBlock(
                widths[i + 1],
                widths[i + 1] if i < deepest else 0,
                widths[i],
                **self._level_options(i, counts[i]),
                up_sample=i < deepest,
            )
            for i in reversed(range(self.num_levels))
        )

    def _level_options(self, level: int, count: int) -> dict[str, Any]:
        """Return what both halves of a level share: attention everywhere but at the finest."""
        return {
            "time_embed_dim": self.config.time_embedding_dim,
            "context_dim": self.config.cross_attention_dim if level > 0 else None,
            "num_blocks": count,
            "groups": self.config.groups,
            "head_dim": self.config.attention_head_dim,
            "self_attention": level > 0,
        }


class RefinerContext(ModelMixin, ConfigMixin):
    """The refiner's empty prompt: one token, already projected.

    The released context has 128 rows, of which the mask keeps the first. With a single valid token
    every softmax is 1, so the other rows change nothing (1.7e-13 in fp64, measured).
    """

    @register_to_config
    def __init__(self, dim: int = 4096) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=False)
