"""3×3 convolutions in Winograd's form in training: fewer products, forwards and backwards.

F(4×4, 3×3) takes a quarter of the products (Lavin and Gray, CVPR 2016) as 36 matrix products. They
are taken in float16 on the points 0, ±√½, ±√2, ∞, where they lose 1.8e-3 in L2; a direct
convolution in bfloat16, autocast's own, loses 2.9e-3 (measured, benchmarks/README.md). Gradients
have no natural size: each is scaled by a power of two so that its largest value fits, on the
device, and its result is scaled back.

Beneath the compiler: three operators that it takes as they are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ksr_distill.training.settings import require

CHANNELS = 256
"""Narrower ones are convolved directly: the transforms' traffic costs more than they save.

Timed one by one on an H200 it is 1.5 to 3.4 times as fast at 1024 channels; at 256 and 512 the host
needs longer to issue a call than cuDNN to compute it (benchmarks/README.md).
"""

TILES_AT_ONCE, CHANNELS_AT_ONCE, TAPS_AT_ONCE = 4, 64, 256
"""What one program works on."""

FORWARD_SCALE = 1 / 4
"""Of the pixels, which norms have bounded: they may reach 13 000 before a tile overflows."""


WAYS = (False, "pictures", "all")
"""``winograd``: ``pictures`` takes estimates and gradients at pictures in this form, ``all`` the
gradients at the weights too."""


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution; under a GPU's autocast and for large batches in Winograd's form."""

    for_weights = False

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Return the convolution's result, in autocast's type where there is autocast."""
        if not self.suits(hidden):
            return super().forward(hidden)
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        output = winograd_conv2d(hidden, self.weight, self.for_weights)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    def suits(self, hidden: Tensor) -> bool:
        """Tell whether the form is possible for these pictures, and pays."""
        batch, channels, height, width = hidden.shape
        return (
            torch.is_autocast_enabled(hidden.device.type)
            and height % 4 == width % 4 == 0
            and batch * height * width >= 4 * channels
        )


class WinogradConv2dForAll(WinogradConv2d):
    """The same, with the gradients at its weights in this form too."""

    for_weights = True


def use_winograd(network: nn.Module, way: bool | str) -> None:
    """Put Winograd's form in the place of wide 3×3 convolutions; they keep their weights.

    Raises:
        ValueError: If there is no such way, or a GPU, but nothing that compiles its kernels.
    """
    require(way in WAYS, "winograd", way, "false, pictures or all")
    if not way:
        return
    if torch.cuda.is_available() and find_spec("triton") is None:
        raise ValueError(
            f"winograd={way!r} needs Triton, which is not installed; install it, or use "
            "winograd=false"
        )
    _replace(network, nn.Conv2d, WinogradConv2dForAll if way == "all" else WinogradConv2d)


def _replace(network: nn.Module, old: type[nn.Conv2d], new: type[nn.Conv2d]) -> None:
    for parent in list(network.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is old and _is_wide_enough(part):
                setattr(parent, name, _of_same_weights(part, new))


def _is_wide_enough(conv: nn.Conv2d) -> bool:
    widths = (conv.in_channels, conv.out_channels)
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (
        shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and min(widths) >= CHANNELS
        and not any(width % CHANNELS_AT_ONCE for width in widths)
    )


def _of_same_weights(conv: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    with torch.device("meta"):
        made = kind(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


@contextmanager
def plain_convolutions(*networks: nn.Module) -> Iterator[None]:
    """Let networks convolve directly for a while: to compare, or to count operations."""
    mine: list[tuple[nn.Module, type[nn.Conv2d]]] = [
        (network, kind)
        for network in networks
        for kind in (WinogradConv2d, WinogradConv2dForAll)
        if any(type(part) is kind for part in network.modules())
    ]
    for network, kind in mine:
        _replace(network, kind, nn.Conv2d)
    try:
        yield
    finally:
        for network, kind in mine:
            _replace(network, nn.Conv2d, kind)


# ---- the operators -------------------------------------------------------------------------------


@torch.library.custom_op("ksr_distill::winograd_conv2d", mutates_args=())
def winograd_conv2d(hidden: Tensor, weight: Tensor, for_weights: bool) -> Tensor:  # noqa: ARG001
    """Return a 3×3 convolution with one pixel of padding, channels last, in the pixels' type.

    Args:
        for_weights: Whether the gradient at the weights is taken in Winograd's form, too.
    """
    if not hidden.is_cuda:
        with _in_own_types(hidden):
            return _channels_last(F.conv2d(hidden, weight.to(hidden.dtype), padding=1))
    taps = _transformed_weight(weight, flipped=False)
    return _convolve(hidden, taps.transpose(1, 2), weight.shape[0], largest=None)


@torch.library.custom_op("ksr_distill::winograd_conv2d_input_gradient", mutates_args=())
def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient at the pixels of ``winograd_conv2d``."""
    if not gradient.is_cuda:
        with _in_own_types(gradient):
            weight = weight.to(gradient.dtype)
            return _channels_last(F.conv_transpose2d(gradient, weight, padding=1))
    taps = _transformed_weight(weight, flipped=True)
    largest = torch.linalg.vector_norm(gradient, math.inf)
    return _convolve(gradient, taps, weight.shape[1], largest=largest)


@torch.library.custom_op("ksr_distill::winograd_conv2d_weight_gradient", mutates_args=())
def weight_gradient(hidden: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient at the weights of ``winograd_conv2d``."""
    if not hidden.is_cuda:
        return direct_weight_gradient(hidden, gradient, weight)
    return _weight_gradient(hidden, gradient, like=weight)


@winograd_conv2d.register_fake
def _(hidden: Tensor, weight: Tensor, for_weights: bool) -> Tensor:  # noqa: ARG001
    batch, _, height, width = hidden.shape
    return _empty(hidden, (batch, weight.shape[0], height, width))


@input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = gradient.shape
    return _empty(gradient, (batch, weight.shape[1], height, width))


@weight_gradient.register_fake
def _(hidden: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ARG001
    hidden, weight, ctx.for_weights = inputs
    ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    hidden, weight = ctx.saved_tensors
    needs_hidden, needs_weight, _ = ctx.needs_input_grad
    gradient = _channels_last(gradient)
    at_weight = weight_gradient if ctx.for_weights else direct_weight_gradient
    return (
        input_gradient(gradient, weight) if needs_hidden else None,
        at_weight(hidden, gradient, weight) if needs_weight else None,
        None,
    )


winograd_conv2d.register_autograd(_backward, setup_context=_keep_for_backward)


def direct_weight_gradient(hidden: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient at the weights: cuDNN's, as autocast would take it."""
    like = torch.empty_like(weight, dtype=hidden.dtype)  # only its shape and layout are read
    _, at_weight, _ = torch.ops.aten.convolution_backward(
        gradient, hidden, like, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    return at_weight.to(weight.dtype)


# ---- what they are made of -----------------------------------------------------------------------


def _kernels() -> Any:
    """Import Triton where it is needed only: a CPU's torch comes without."""
    return import_module("ksr_distill.training.winograd_kernels")


def _convolve(
    pixels: Float[Tensor, "b c h w"],
    taps: Float[Tensor, "p c c2"],
    out_channels: int,
    *,
    largest: Float[Tensor, ""] | None,
) -> Float[Tensor, "b c2 h w"]:
    batch, _, height, width = pixels.shape
    num_tiles = batch * height * width // 16
    sizes = {"SCALED": largest is not None, "TILES": TILES_AT_ONCE, "CHANNELS": CHANNELS_AT_ONCE}
    rows = math.ceil(num_tiles / TILES_AT_ONCE)
    with torch.cuda.device_of(pixels):
        transformed = _transformed_pixels(pixels, largest)
        products = torch.empty(36, num_tiles, out_channels, dtype=taps.dtype, device=taps.device)
        torch.bmm(transformed, taps, out=products)  # what is written out is not autocast's
        del transformed
        output = _empty(pixels, (batch, out_channels, height, width))
        _kernels().transform_output_kernel[(rows, out_channels // CHANNELS_AT_ONCE)](
            products, largest, output, width, num_tiles, out_channels, FORWARD_SCALE, **sizes
        )
    return output


def _weight_gradient(
    pixels: Float[Tensor, "b i h w"],
    gradient: Float[Tensor, "b o h w"],
    *,
    like: Float[Tensor, "o i 3 3"],
) -> Float[Tensor, "o i 3 3"]:
    gradient = _channels_last(gradient)
    largest = torch.linalg.vector_norm(gradient, math.inf)
    batch, channels, height, width = gradient.shape
    num_tiles = batch * height * width // 16
    rows = math.ceil(num_tiles / TILES_AT_ONCE)
    points = torch.empty(36, num_tiles, channels, dtype=torch.float16, device=pixels.device)
    with torch.cuda.device_of(pixels):
        _kernels().transform_gradient_kernel[(rows, channels // CHANNELS_AT_ONCE)](
            gradient, largest, points, width, num_tiles, channels, TILES=TILES_AT_ONCE,
            CHANNELS=CHANNELS_AT_ONCE,
        )  # fmt: skip
        # A sum over all tiles of a batch: too large for float16, and the taps are differences.
        products = _float32_products(points.transpose(1, 2), _transformed_pixels(pixels, None))
        out = torch.empty_like(like)
        count = like.shape[0] * like.shape[1]
        _kernels().transform_weight_gradient_kernel[(math.ceil(count / TAPS_AT_ONCE),)](
            products, largest, out, count, like.shape[1], *out.stride(), FORWARD_SCALE,
            BLOCK=TAPS_AT_ONCE,
        )  # fmt: skip
    return out


def _float32_products(
    one: Float[Tensor, "p o t"], other: Float[Tensor, "p t i"]
) -> Float[Tensor, "p o i"]:
    if not one.is_cuda:
        return torch.bmm(one.float(), other.float())
    with torch.autocast("cuda", enabled=False):
        return torch.bmm(one, other, out_dtype=torch.float32)


def _transformed_pixels(
    pixels: Float[Tensor, "b c h w"], largest: Float[Tensor, ""] | None
) -> Float[Tensor, "p t c"]:
    """Return every tile at the 36 points, in float16."""
    pixels = _channels_last(pixels)
    batch, channels, height, width = pixels.shape
    num_tiles = batch * height * width // 16
    out = torch.empty(36, num_tiles, channels, dtype=torch.float16, device=pixels.device)
    grid = (math.ceil(num_tiles / TILES_AT_ONCE), channels // CHANNELS_AT_ONCE)
    _kernels().transform_input_kernel[grid](
        pixels, largest, out, height, width, num_tiles, channels, FORWARD_SCALE,
        SCALED=largest is not None, TILES=TILES_AT_ONCE, CHANNELS=CHANNELS_AT_ONCE,
    )  # fmt: skip
    return out


def _transformed_weight(
    weight: Float[Tensor, "o i 3 3"], *, flipped: bool
) -> Float[Tensor, "p o i"]:
    """Return a convolution's taps at the 36 points, in float16."""
    count = weight.shape[0] * weight.shape[1]
    out = torch.empty(36, *weight.shape[:2], dtype=torch.float16, device=weight.device)
    with torch.cuda.device_of(weight):
        _kernels().transform_weight_kernel[(math.ceil(count / TAPS_AT_ONCE),)](
            weight, out, count, weight.shape[1], *weight.stride(), FLIPPED=flipped,
            BLOCK=TAPS_AT_ONCE,
        )  # fmt: skip
    return out


def _in_own_types(like: Tensor) -> torch.autocast:
    """Return a context without autocast, which would take float16's products in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def _channels_last(pixels: Tensor) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
