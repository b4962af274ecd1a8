"""How fast, and how exact, training's wide convolutions are in Winograd's form and directly.

    python -m benchmarks.convolutions      # a GPU; seconds

The shapes are those of a full-size update: 16 crops of 256², or 4 of 512². Errors are those of L2
against float64, the gradients' those of noise as small as an update's.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import matmul_rate, time_calls
from ksr_distill.training import winograd

SHAPES = ((16, 1024, 32), (16, 512, 32), (16, 256, 64), (4, 1024, 64), (4, 512, 64), (4, 256, 128))
"""Crops, channels, side of the feature map."""


class Ways(NamedTuple):
    """The same result by two roads."""

    what: str
    direct: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    exact: Callable[[], Tensor]


def ways_of(batch: int, channels: int, side: int, device: torch.device) -> list[Ways]:
    """Return what an update takes of one convolution."""
    torch.manual_seed(0)
    shape = (batch, channels, side, side)
    pixels, gradient = (winograd._channels_last(torch.randn(shape, device=device).bfloat16())
                        for _ in range(2))  # fmt: skip
    gradient = gradient * 1e-6
    weight = torch.randn(channels, channels, 3, 3, device=device) / (3 * channels**0.5)
    weight = weight.to(memory_format=torch.channels_last)

    def input_gradient() -> Tensor:
        return torch.ops.aten.convolution_backward(
            gradient, pixels, weight.bfloat16(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip

    few = slice(0, 2)  # in float64 two pictures are enough
    return [
        Ways("estimate", lambda: F.conv2d(pixels, weight.bfloat16(), padding=1),
             partial(winograd.winograd_conv2d, pixels, weight, False),
             lambda: F.conv2d(pixels[few].double(), weight.double(), padding=1)),
        Ways("gradient at pictures", input_gradient,
             partial(winograd.input_gradient, gradient, weight),
             lambda: F.conv_transpose2d(gradient[few].double(), weight.double(), padding=1)),
        Ways("gradient at weights",
             partial(winograd.direct_weight_gradient, pixels, gradient, weight),
             partial(winograd.weight_gradient, pixels, gradient, weight),
             lambda: torch.nn.grad.conv2d_weight(pixels.double(), weight.shape, gradient.double(),
                                                 padding=1)),
    ]  # fmt: skip


def error_of(value: Tensor, exact: Tensor) -> float:
    """Return the relative error in L2, of the pictures that there are an exact result of."""
    value = value[: exact.shape[0]].double()
    return float((value - exact).norm() / exact.norm())


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Print a line for each shape and result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=int, nargs="+", help="numbers of the shapes, from 0")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    print(f"8192³ products: {matmul_rate(device) / 1e12:.0f} TFLOP/s")
    print("| crops, channels, side | what | direct, ms | TFLOP/s | Winograd, ms | host, ms "
          "| by the plain count, TFLOP/s | error, direct | error, Winograd |")  # fmt: skip
    print("| --- " * 9 + "|")
    for number in options.shapes or range(len(SHAPES)):
        batch, channels, side = SHAPES[number]
        flops = 18 * channels**2 * batch * side**2 / 1e12
        for ways in ways_of(batch, channels, side, device):
            exact = ways.exact()
            errors = [error_of(way(), exact) for way in (ways.direct, ways.ours)]
            slow, fast = (time_calls(way, calls=10, repeats=5, device=device)
                          for way in (ways.direct, ways.ours))  # fmt: skip
            print(f"| {batch}, {channels}, {side} | {ways.what} | {1e3 * slow.seconds:.3f} "
                  f"| {flops / slow.seconds:.0f} | {1e3 * fast.seconds:.3f} "
                  f"| {1e3 * fast.host_seconds:.3f} | {flops / fast.seconds:.0f} "
                  f"| {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
