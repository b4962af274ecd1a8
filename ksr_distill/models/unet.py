"""The super-resolution U-Net: x_t, a timestep and the low-resolution image in, pred_x_0 out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Real
from torch import Tensor, nn

from ksr_distill.model_json import as_object
from ksr_distill.models.alignment import align_weights
from ksr_distill.models.blocks import ResNetBlock, TimeEmbedding, Upsampling
from ksr_distill.models.norms import GroupNorm

MAX_BLOCKS = 1000
"""Of a level. The released network has 8; a number out of a damaged config would build for ever."""


class Encoded(NamedTuple):
    """The output of the encoder: a critic reads it, and the decoder continues from it.

    Attributes:
        levels: The output of every down level, finest first, e.g. for the full size 128 channels
            at H/2, 256 at H/4, 512 at H/8 and 1024 at H/8.
        time_embedding: One vector per sample, shape (b, time_embedding_dim).
    """

    levels: tuple[Tensor, ...]
    time_embedding: Tensor


class KSRUNet(ModelMixin, ConfigMixin):
    """KandiSuperRes' U-Net: convolutions only, conditioned by concatenation, predicts x_0.

    Args:
        base_channels: Channels of the first level's multiplier 1.
        stem_channels: Channels after the first convolution; null means base_channels.
        channel_multipliers: Channels of each level, in units of base_channels. All levels but the
            last halve the resolution.
        num_blocks: ResNet blocks of each level, at least 2 where the released layout is wanted.
        dropout: In every block; 0 for students and frozen trunks.
        predict_residual: Add the bilinearly enlarged lowres to the output, and start from exactly
            that (the last layer is zero). Off for the released weights.
        upsampling: ``transposed_conv`` is the released layer; ``nearest`` repeats pixels, which
            is cheaper and does not checkerboard on flat features.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResNetBlock",)

    @register_to_config
    def __init__(  # noqa: PLR0913, PLR0917 - diffusers' config is flat and its keys are the arguments
        self,
        base_channels: int = 128,
        stem_channels: int | None = None,
        channel_multipliers: Sequence[int] = (1, 2, 4, 8),
        num_blocks: Sequence[int] = (2, 4, 8, 8),
        time_embedding_dim: int = 512,
        num_groups: int = 32,
        dropout: float = 0.0,
        predict_residual: bool = False,
        upsampling: Upsampling = "transposed_conv",
    ) -> None:
        super().__init__()
        stem = stem_channels or base_channels
        widths = [stem, *(base_channels * m for m in channel_multipliers)]
        check_unet_config(widths, num_blocks, num_groups, upsampling)
        block_options = {"time_embedding_dim": time_embedding_dim, "num_groups": num_groups,
                         "dropout": dropout, "upsampling": upsampling}  # fmt: skip
        self.gradient_checkpointing = False
        self.time_embedding = TimeEmbedding(stem, time_embedding_dim)
        self.conv_in = nn.Conv2d(6, stem, 3, padding=1)
        self.down_levels = nn.ModuleList()
        self.up_levels = nn.ModuleList()
        deepest = len(num_blocks) - 1
        for level, count in enumerate(num_blocks):
            self.down_levels.append(
                _down_level(widths[level], widths[level + 1], count, level < deepest, block_options)
            )
        for level in reversed(range(len(num_blocks))):
            skip = 0 if level == deepest else widths[level + 1]
            self.up_levels.append(
                _up_level(widths[level + 1], skip, widths[level], num_blocks[level],
                          level < deepest, block_options)
            )  # fmt: skip
        self.norm_out = GroupNorm(num_groups, stem)
        self.conv_out = nn.Conv2d(stem, 3, 3, padding=1)
        if predict_residual:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(cast(Tensor, self.conv_out.bias))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the model of a folder, as ModelMixin does, with its weights aligned."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return config.json, as ConfigMixin does.

        Raises:
            ValueError: If it holds no object: diffusers would take what it holds for a folder.
        """
        folder = args[0] if args else kwargs["pretrained_model_name_or_path"]
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        as_object(config, where=Path(folder, kwargs.get("subfolder") or "", "config.json"))
        return loaded

    @property
    def stride(self) -> int:
        """Both sides of x_t must be multiples of this."""
        return 2 ** (len(self.down_levels) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each of ``Encoded.levels``."""
        return tuple(self.config.base_channels * m for m in self.config.channel_multipliers)

    def encode(
        self,
        x_t: Float[Tensor, "b 3 H W"],
        t: Real[Tensor, " b"],
        lowres: Float[Tensor, "b 3 h w"],
    ) -> Encoded:
        """Return the features of the encoder, the downward half.

        Args:
            t: Timesteps in [0, 1000); kept in float32 inside, whatever the weights' dtype.
            lowres: In [-1, 1]; enlarged bilinearly to x_t's size and concatenated after it.
        """
        self._check_size(x_t)
        conditioned = torch.cat([x_t, enlarge(lowres.to(x_t.dtype), x_t)], dim=1)
        hidden = self.conv_in(conditioned.to(self.conv_in.weight.dtype))
        time_embedding = self.time_embedding(t).to(hidden.dtype)
        levels = []
        for down_level in self.down_levels:
            hidden = self._run(cast(nn.ModuleList, down_level), hidden, time_embedding)
            levels.append(hidden)
        return Encoded(tuple(levels), time_embedding)

    def decode(self, encoded: Encoded) -> Float[Tensor, "b 3 H W"]:
        """Return the decoder's output: pred_x_0, or its residual over the enlarged lowres."""
        skips = list(encoded.levels)
        hidden = skips.pop()
        for i, up_level in enumerate(self.up_levels):
            hidden = hidden if i == 0 else torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(cast(nn.ModuleList, up_level), hidden, encoded.time_embedding)
        return self.finish(hidden)

    def finish(self, hidden: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
        """Apply the last norm and convolution."""
        return self.conv_out(F.silu(self.norm_out(hidden)))

    def forward(
        self,
        x_t: Float[Tensor, "b 3 H W"],
        t: Real[Tensor, " b"],
        lowres: Float[Tensor, "b 3 h w"],
    ) -> Float[Tensor, "b 3 H W"]:
        """Return pred_x_0, the estimate of the clean image, unclamped.

        In the weights' dtype, but float32 with ``predict_residual``.

        Args:
            t: Timesteps in [0, 1000).
            lowres: In [-1, 1]; any size, enlarged bilinearly to x_t's.
        """
        output = self.decode(self.encode(x_t, t, lowres))
        if self.config.predict_residual:  # in float32: a sum in bf16 would round to half levels
            return output.float() + enlarge(lowres.float(), output)
        return output

    def _run(self, level: nn.ModuleList, hidden: Tensor, time_embedding: Tensor) -> Tensor:
        for block in level:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                checkpointed = cast(Callable[..., Tensor], self._gradient_checkpointing_func)
                hidden = checkpointed(block, hidden, time_embedding)
            else:
                hidden = block(hidden, time_embedding)
        return hidden

    def _check_size(self, x_t: Tensor) -> None:
        height, width = x_t.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"x_t is {width}×{height} px, but both sides must be multiples of {self.stride} "
                f"(2 to the number of halvings); pad by reflection and crop the result"
            )


def enlarge(lowres: Float[Tensor, "b 3 h w"], like: Tensor) -> Float[Tensor, "b 3 H W"]:
    """Return lowres at ``like``'s size: bilinear, align_corners off, no antialiasing."""
    return F.interpolate(lowres, like.shape[-2:], mode="bilinear")


def layout_of(unet: KSRUNet) -> dict[str, Any]:
    """Return the constructor's arguments as plain values, without diffusers' private entries."""
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


def check_unet_config(
    widths: Sequence[int], num_blocks: Sequence[int], num_groups: int, upsampling: str
) -> None:
    """Refuse a layout that cannot be built, by its config key."""
    if upsampling not in get_args(Upsampling):
        raise ValueError(
            f"model.upsampling={upsampling!r} is not allowed; "
            f"use {' or '.join(get_args(Upsampling))}"
        )
    if len(widths) - 1 != len(num_blocks):
        raise ValueError(
            f"model.num_blocks has {len(num_blocks)} levels and model.channel_multipliers "
            f"{len(widths) - 1}; give both one entry for each level"
        )
    if any(type(count) is not int or not 1 <= count <= MAX_BLOCKS for count in num_blocks):
        raise ValueError(
            f"model.num_blocks={list(num_blocks)} is not allowed; use whole numbers from 1 to "
            f"{MAX_BLOCKS}, one for each level"
        )
    if any(type(width) is not int or width < 1 for width in widths):
        raise ValueError(
            f"model.base_channels times model.channel_multipliers gives the channels {widths}; "
            "use whole numbers from 1 on"
        )
    if type(num_groups) is not int or num_groups < 1:
        raise ValueError(f"model.num_groups={num_groups!r} is not a whole number from 1 on")
    odd = [width for width in widths if width % num_groups]
    if odd:
        raise ValueError(
            f"model.num_groups={num_groups} does not divide the channels {odd}; "
            "use a common divisor of all levels' channels"
        )


def _down_level(
    in_channels: int, out_channels: int, count: int, halves: bool, options: dict
) -> nn.ModuleList:
    """The first block changes the resolution and the channels."""
    first = ResNetBlock(
        in_channels, out_channels, resampling="down" if halves else "none", **options
    )
    rest = (ResNetBlock(out_channels, out_channels, **options) for _ in range(count - 1))
    return nn.ModuleList([first, *rest])


def _up_level(
    in_channels: int, skip: int, out_channels: int, count: int, doubles: bool, options: dict
) -> nn.ModuleList:
    """The first block takes the skip in; the last changes the resolution and the channels."""
    resampling = "up" if doubles else "none"
    if count == 1:
        return nn.ModuleList(
            [ResNetBlock(in_channels + skip, out_channels, resampling=resampling, **options)]
        )
    first = ResNetBlock(in_channels + skip, in_channels, **options)
    inner = (ResNetBlock(in_channels, in_channels, **options) for _ in range(count - 2))
    last = ResNetBlock(in_channels, out_channels, resampling=resampling, **options)
    return nn.ModuleList([first, *inner, last])
