"""Group norm and 3×3 convolutions in few passes over memory; plain torch where there is no GPU.

A norm is a factor and an offset per channel once its sums are known. The sums are gathered where
the picture is written, the factors are applied where it is read: a norm costs no pass of its own.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WINOGRAD_CHANNELS = 256
"""From this width on Winograd's form is the faster one (measured on an H200; below it the
transforms' memory traffic costs more than the products that they save)."""

WINOGRAD_BYTES = 1 << 29
"""Transformed tiles at once; a larger picture is worked on in bands."""

TILES_AT_ONCE, TILE_CHANNELS = 4, 64
PIXELS_AT_ONCE, PIXEL_CHANNELS = 32, 128
"""What one program works on; the second pair reaches 3.9 of 4.3 TB/s where 64 × 64 reaches 3.5
(measured)."""

PROGRAMS = 132 * 16
"""Programs that gather sums: enough for every multiprocessor of the largest cards, and few rows."""

UNNORMALISED_SCALE = 1 / 16
"""Winograd's transform adds up to 20 inputs; those that no norm has bounded are scaled down."""


class Features(NamedTuple):
    """A picture inside a network, with what the next norm wants to know.

    Attributes:
        pixels: Shape (b, c, h, w), channels last.
        sums: Σx and Σx² per channel, shape (b, rows, 2, c), to be added over the rows.
        pending_bias: What is missing in the pixels, but not in the sums; shape (c,).
    """

    pixels: Tensor
    sums: Tensor | None = None
    pending_bias: Tensor | None = None


class Norm(NamedTuple):
    """What a convolution does to each pixel that it reads: x·factor + offset, [·Y + B], [SiLU].

    Attributes:
        affine: Factors and offsets in float32, shape (b, 2, c).
        silu: Whether a SiLU follows.
        spatial: Factors and offsets per latent, shape (b, 2c, h/ratio, w/ratio), channels last.
    """

    affine: Tensor
    silu: bool = False
    spatial: Tensor | None = None


def has_kernels(pixels: Tensor) -> bool:
    """Tell whether the Triton kernels serve this tensor."""
    return pixels.is_cuda and pixels.dtype in (torch.float16, torch.bfloat16)


def _kernels() -> Any:
    """Import Triton where it is needed only: a CPU's torch comes without."""
    return import_module("ksr_distill.inference.acceleration.kernels")


def with_sums(
    pixels: Float[Tensor, "b c h w"], pending_bias: Float[Tensor, " c"] | None = None
) -> Features:
    """Return the features with the sums of their pixels (and of the bias that is pending)."""
    if not has_kernels(pixels):
        value = pixels if pending_bias is None else pixels + pending_bias[:, None, None]
        return Features(pixels, _plain_sums(value), pending_bias)
    return Features(pixels, _add(pixels, pending_bias, None, store=False), pending_bias)


def add(
    pixels: Float[Tensor, "b c h w"],
    bias: Float[Tensor, " c"] | None,
    residual: Float[Tensor, "b c h w"] | None = None,
) -> Features:
    """Return pixels + bias + residual with their sums; the pixels are overwritten."""
    if not has_kernels(pixels):
        if bias is not None:
            pixels = pixels + bias[:, None, None]
        pixels = pixels if residual is None else pixels + residual
        return Features(pixels, _plain_sums(pixels))
    return Features(pixels, _add(pixels, bias, residual, store=True))


def norm_factors(
    features: Features,
    norm: nn.GroupNorm,
    scale_shift: Float[Tensor, "b c2"] | None = None,
) -> Float[Tensor, "b two c"]:
    """Return factor and offset: GroupNorm(x)·(scale + 1) + shift = x·factor + offset."""
    pixels, sums, pending = features
    if sums is None:
        sums = cast(Tensor, with_sums(pixels, pending).sums)
    batch, channels, height, width = pixels.shape
    if not has_kernels(pixels):
        return _plain_factors(sums, norm, scale_shift, pending, height * width)
    affine = torch.empty(batch, 2, channels, device=pixels.device)
    per_group = channels // norm.num_groups
    rows = sums.shape[1]
    lanes = _power_of_two(per_group)
    rows_at_once = max(16, min(2048 // lanes, _power_of_two(rows)))
    for i in range(batch):
        own = None if scale_shift is None else scale_shift[i]
        _kernels().finish_norm_kernel[(norm.num_groups,)](
            sums[i], norm.weight, norm.bias, own, pending, affine[i],
            rows, height * width, norm.eps, channels,
            PER_GROUP=per_group, AFFINE=norm.weight is not None, SCALE_SHIFT=own is not None,
            PENDING=pending is not None, ROWS=rows_at_once, CHANNELS=lanes,
        )  # fmt: skip
    return affine


def apply_norm(
    pixels: Float[Tensor, "b c h w"], norm: Norm, *, in_place: bool = False
) -> Float[Tensor, "b c h w"]:
    """Return the normalised picture; in place, where the old one is not needed any more."""
    if not has_kernels(pixels):
        return _plain_norm(pixels, norm)
    out = pixels if in_place else torch.empty_like(pixels, memory_format=torch.channels_last)
    batch, channels, height, width = pixels.shape
    grid = (math.ceil(height * width / PIXELS_AT_ONCE), math.ceil(channels / PIXEL_CHANNELS))
    for i in range(batch):
        _kernels().apply_norm_kernel[grid](
            pixels[i], norm.affine[i], _of(norm.spatial, i), out[i], height * width, width,
            channels, SILU=norm.silu, SPATIAL=_ratio(norm, width), PIXELS=PIXELS_AT_ONCE,
            CHANNELS=PIXEL_CHANNELS,
        )  # fmt: skip
    return out


def convolve(
    pixels: Float[Tensor, "b c h w"],
    conv: nn.Conv2d,
    norm: Norm | None = None,
    *,
    residual: Callable[[], Tensor] | None = None,
    residual_bias: Float[Tensor, " c2"] | None = None,
    doubles: bool = False,
    overwrites: bool = False,
) -> Features:
    """Return conv(norm(pixels)) + bias [+ residual], with the sums for the next norm.

    Args:
        residual: Called as late as possible: at full size every picture is a gigabyte.
        residual_bias: Added too.
        doubles: Repeat each pixel 2×2 before the convolution.
        overwrites: The pixels are not needed any more.
    """
    bias = _sum(conv.bias, residual_bias)
    if has_kernels(pixels) and prefers_winograd(conv, pixels, doubles=doubles):
        return _winograd(pixels, conv, norm, bias, residual, up=2 if doubles else 1)
    if norm is not None:
        pixels = apply_norm(pixels, norm, in_place=overwrites)
    if doubles:
        pixels = F.interpolate(pixels, scale_factor=2.0, mode="nearest")
    pixels = F.conv2d(pixels, conv.weight, None, conv.stride, conv.padding)
    if residual is None:
        return with_sums(pixels, bias)
    return add(pixels, bias, residual())


def prefers_winograd(conv: nn.Conv2d, pixels: Tensor, *, doubles: bool = False) -> bool:
    """Tell whether a convolution is one, and wide enough, for Winograd's form."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
        and conv.in_channels % TILE_CHANNELS == conv.out_channels % TILE_CHANNELS == 0
        and pixels.dtype == torch.float16
        and pixels.shape[2] * pixels.shape[3] * (4 if doubles else 1) >= 4 * conv.in_channels
    )


def winograd_weight(weight: Float[Tensor, "o i k k"]) -> Float[Tensor, "n o i"]:
    """Return a convolution's taps at the 36 points, in its dtype."""
    count = weight.shape[0] * weight.shape[1]
    out = weight.new_empty(36, *weight.shape[:2])
    _kernels().winograd_weight_kernel[(math.ceil(count / 256),)](
        weight, out, count, weight.shape[1], *weight.stride(), BLOCK=256
    )
    return out


def _winograd(
    pixels: Tensor,
    conv: nn.Conv2d,
    norm: Norm | None,
    bias: Tensor | None,
    residual: Callable[[], Tensor] | None,
    up: int,
) -> Features:
    is_bounded = norm is not None
    if norm is not None and norm.spatial is not None and _ratio(norm, pixels.shape[3]) % 4:
        pixels, norm = apply_norm(pixels, norm), None  # fine latents: a tile lies on several
    batch, channels, height, width = pixels.shape
    height, width = height * up, width * up
    across, down = math.ceil(width / 4), math.ceil(height / 4)
    whole = height % 4 == 0 and width % 4 == 0
    out_channels = conv.out_channels
    weight = winograd_weight(conv.weight).transpose(1, 2)
    tile_bytes = 36 * 2 * (channels + out_channels)
    rows_at_once = max(1, min(down, WINOGRAD_BYTES // (tile_bytes * across)))
    rows_at_once = math.ceil(down / math.ceil(down / rows_at_once))
    band = rows_at_once * across
    rounds = max(1, band * math.ceil(out_channels / TILE_CHANNELS) // (TILES_AT_ONCE * PROGRAMS))
    programs = math.ceil(band / (TILES_AT_ONCE * rounds))
    tops = range(0, down, rows_at_once)
    out = torch.empty(
        (batch, out_channels, height, width), dtype=pixels.dtype, device=pixels.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    sums = torch.empty(batch, programs * len(tops), 2, out_channels, device=pixels.device)
    scale = 1.0 if is_bounded else UNNORMALISED_SCALE
    bias = pixels.new_zeros(out_channels) if bias is None else bias
    rest = None if residual is None else residual()
    for i in range(batch):
        for number, top in enumerate(tops):
            tiles = min(rows_at_once, down - top) * across
            transformed = pixels.new_empty(36, tiles, channels)
            grid = (math.ceil(tiles / TILES_AT_ONCE), math.ceil(channels / TILE_CHANNELS))
            _kernels().winograd_input_kernel[grid](
                pixels[i], None if norm is None else norm.affine[i],
                None if norm is None else _of(norm.spatial, i), transformed,
                height, width, across, top * across, tiles, channels, scale,
                NORM=norm is not None, SILU=norm is not None and norm.silu,
                SPATIAL=0 if norm is None else _ratio(norm, width), UP=up,
                WHOLE=whole, TILES=TILES_AT_ONCE, CHANNELS=TILE_CHANNELS,
            )  # fmt: skip
            products = torch.bmm(transformed, weight)
            del transformed
            grid = (programs, math.ceil(out_channels / TILE_CHANNELS))
            _kernels().winograd_output_kernel[grid](
                products, bias, (out if rest is None else rest)[i], out[i], sums[i],
                height, width, across, top * across, tiles, out_channels, 1 / scale,
                number * programs, rounds, RESIDUAL=rest is not None, WHOLE=whole,
                TILES=TILES_AT_ONCE, CHANNELS=TILE_CHANNELS,
            )  # fmt: skip
    return Features(out, sums)


def _add(pixels: Tensor, bias: Tensor | None, residual: Tensor | None, *, store: bool) -> Tensor:
    batch, channels, height, width = pixels.shape
    across = math.ceil(channels / PIXEL_CHANNELS)
    blocks = math.ceil(height * width / PIXELS_AT_ONCE)
    rounds = max(1, blocks * across // PROGRAMS)
    programs = math.ceil(blocks / rounds)
    sums = torch.empty(batch, programs, 2, channels, device=pixels.device)
    bias = bias if bias is not None else pixels.new_zeros(channels)
    for i in range(batch):
        _kernels().add_kernel[(programs, across)](
            pixels[i], bias, _of(residual, i), pixels[i], sums[i], height * width, channels,
            rounds, RESIDUAL=residual is not None, STORE=store, SUMS=True, PIXELS=PIXELS_AT_ONCE,
            CHANNELS=PIXEL_CHANNELS,
        )  # fmt: skip
    return sums


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _of(tensor: Tensor | None, index: int) -> Tensor | None:
    return None if tensor is None else tensor[index]


def _ratio(norm: Norm, width: int) -> int:
    return 0 if norm.spatial is None else width // norm.spatial.shape[3]


def _plain_sums(value: Tensor) -> Tensor:
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return torch.stack([value.sum((2, 3)), value.square().sum((2, 3))], dim=1)[:, None]


def _plain_factors(
    sums: Tensor,
    norm: nn.GroupNorm,
    scale_shift: Tensor | None,
    pending: Tensor | None,
    num_pixels: int,
) -> Tensor:
    batch, channels = sums.shape[0], sums.shape[3]
    grouped = sums.sum(1).double().reshape(batch, 2, norm.num_groups, -1).sum(3)
    mean, square = (grouped / (num_pixels * channels // norm.num_groups)).unbind(1)
    factor = (square - mean.square() + norm.eps).rsqrt()
    factor, mean = (v.repeat_interleave(channels // norm.num_groups, dim=1) for v in (factor, mean))
    offset = -mean * factor
    if norm.weight is not None:
        factor, offset = factor * norm.weight, offset * norm.weight + norm.bias
    if scale_shift is not None:
        scale, shift = scale_shift.chunk(2, dim=1)
        factor, offset = factor * (scale + 1), offset * (scale + 1) + shift
    if pending is not None:
        offset = offset + factor * pending
    return torch.stack([factor, offset], dim=1).to(sums.dtype)


def _plain_norm(pixels: Tensor, norm: Norm) -> Tensor:
    factor, offset = norm.affine[..., None, None].unbind(1)
    value = pixels.to(factor.dtype) * factor + offset
    if norm.spatial is not None:
        spatial = F.interpolate(norm.spatial.to(value.dtype), value.shape[2:], mode="nearest")
        own_factor, own_offset = spatial.chunk(2, dim=1)
        value = value * own_factor + own_offset
    return (F.silu(value) if norm.silu else value).to(pixels.dtype)
