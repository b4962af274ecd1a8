"""The Triton kernels, on a GPU, or anywhere in Triton's interpreter where Triton is installed."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ksr_distill.inference.acceleration import operations
from ksr_distill.inference.acceleration.operations import Norm

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch):
    if not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        monkeypatch.setattr(operations, "has_kernels", lambda _: True)
    for name, value in {"WINOGRAD_CHANNELS": 16, "TILE_CHANNELS": 16}.items():
        monkeypatch.setattr(operations, name, value)


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ksr_distill.inference.acceleration import kernels

TYPES = {"affine_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32", "eps": "fp32"}
FLAGS = ("NORM", "SILU", "RESIDUAL", "WHOLE", "STORE", "SUMS", "AFFINE", "SCALE_SHIFT", "PENDING")
SIZES = {"TILES": 4, "PIXELS": 32, "ROWS": 64, "PER_GROUP": 12, "BLOCK": 256}

def compile_for_hopper(kernel, **constants):
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else TYPES.get(n, "*fp16" if n.endswith("_ptr") else "i32")
        for n in names
    }
    if kernel is kernels.finish_norm_kernel:
        signature["out_ptr"] = "*fp32"
    places = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    triton.compile(source, target=GPUTarget("cuda", 90, 32))

for kernel in (kernels.winograd_input_kernel, kernels.winograd_weight_kernel,
               kernels.winograd_output_kernel, kernels.add_kernel, kernels.finish_norm_kernel,
               kernels.apply_norm_kernel):
    names = kernel.arg_names
    for flags, spatial in itertools.product((True, False), (0, 8)):
        constants = {n: flags for n in FLAGS} | SIZES
        constants |= {"SPATIAL": spatial, "UP": 1 if flags else 2}
        constants |= {"CHANNELS": 16 if kernel is kernels.finish_norm_kernel else 64}
        if "SPATIAL" in names or not spatial:
            compile_for_hopper(kernel, **{n: v for n, v in constants.items() if n in names})
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


def image(*shape):
    pixels = torch.randn(*shape, device=DEVICE, dtype=torch.float16)
    return pixels.contiguous(memory_format=torch.channels_last)


def relative_error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def norm_of(pixels, norm, scale_shift, spatial, ratio):
    """Return the operations' norm and what it does to the pixels, in float64."""
    affine = operations.norm_factors(operations.with_sums(pixels), norm, scale_shift)
    scale, shift = scale_shift.double()[:, :, None, None].chunk(2, dim=1)
    expected = norm.double()(pixels.double()) * (scale + 1) + shift
    norm.half()
    if spatial is not None:
        factor, offset = F.interpolate(spatial.double(), scale_factor=ratio).chunk(2, dim=1)
        expected = expected * factor + offset
    return Norm(affine, silu=True, spatial=spatial), F.silu(expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "height", "width", "ratio", "residual"),
    [
        ((32, 16), 12, 16, 0, True),
        ((16, 48), 10, 14, 0, False),  # tiles reach over the edge
        ((32, 32), 16, 16, 8, True),
        ((32, 16), 16, 8, 4, False),
        ((32, 16), 12, 16, 2, True),  # several latents to a tile
    ],
)
def test_winograd_is_the_convolution_of_the_normed_picture(
    channels, height, width, ratio, residual
):
    torch.manual_seed(0)
    c, out = channels
    pixels = image(2, c, height, width)
    norm = nn.GroupNorm(4, c).to(DEVICE).half()
    nn.init.normal_(norm.weight)
    conv = nn.Conv2d(c, out, 3, padding=1).to(DEVICE).half()
    spatial = image(2, 2 * c, height // ratio, width // ratio) if ratio else None
    scale_shift = torch.randn(2, 2 * c, device=DEVICE).half() * 0.3
    ready, normed = norm_of(pixels, norm, scale_shift, spatial, ratio)
    rest = image(2, out, height, width)
    expected = F.conv2d(normed, conv.weight.double(), conv.bias.double(), padding=1)
    expected = expected + rest.double() if residual else expected
    features = operations.convolve(
        pixels, conv, ready, residual=(lambda: rest) if residual else None
    )
    # Float16's own rounding is 3e-4; the transforms add to it. bfloat16's would be 3e-3.
    assert relative_error(features.pixels, expected) < 2e-3
    assert relative_error(operations.apply_norm(pixels, ready), normed) < 4e-4
    exact = torch.stack([features.pixels.float().sum((2, 3)),
                         features.pixels.float().square().sum((2, 3))], dim=1)  # fmt: skip
    assert relative_error(features.sums.sum(1), exact) < 1e-5


@torch.no_grad()
def test_winograd_repeats_pixels_and_works_in_bands(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(operations, "WINOGRAD_BYTES", 36 * 2 * 32 * 8)  # two rows of tiles at once
    pixels, conv = image(1, 16, 8, 8), nn.Conv2d(16, 16, 3, padding=1).to(DEVICE).half()
    features = operations.convolve(pixels, conv, doubles=True)
    enlarged = F.interpolate(pixels.double(), scale_factor=2)
    expected = F.conv2d(enlarged, conv.weight.double(), conv.bias.double(), padding=1)
    assert relative_error(features.pixels, expected) < 3e-3
    exact = features.pixels.float().square().sum((2, 3))
    assert relative_error(features.sums.sum(1)[:, 1], exact) < 1e-5


@torch.no_grad()
def test_sums_of_a_pending_bias_and_of_what_is_added():
    torch.manual_seed(0)
    pixels, rest = image(2, 24, 9, 11), image(2, 24, 9, 11)
    bias = torch.randn(24, device=DEVICE).half()
    features = operations.with_sums(pixels, bias)
    norm = nn.GroupNorm(3, 24).to(DEVICE).half()
    expected = F.group_norm(pixels.double() + bias.double()[:, None, None], 3)
    ready = Norm(operations.norm_factors(features, norm))
    assert relative_error(operations.apply_norm(pixels, ready), expected) < 4e-4
    total = pixels.double() + bias.double()[:, None, None] + rest.double()
    added = operations.add(pixels, bias, rest)
    assert relative_error(added.pixels, total) < 4e-4
    assert relative_error(added.sums.sum(1)[:, 0], total.sum((2, 3))) < 1e-3
    assert math.prod(added.sums.shape[2:]) == 2 * 24
