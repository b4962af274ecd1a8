"""Winograd's form in training is the same convolution, for the pictures and for the gradients."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ksr_distill.models.blocks import ResNetBlock
from ksr_distill.training import winograd
from ksr_distill.training.winograd import WinogradConv2d, plain_convolutions, use_winograd

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(winograd, "CHANNELS", 16)
    monkeypatch.setattr(winograd, "CHANNELS_AT_ONCE", 16)
    if not HAS_GPU:
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")


def relative_error(value, reference):
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def image(*shape, dtype=torch.float32):
    pixels = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return pixels.contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 32, 8, 12), (1, 16, 4, 4), (2, 16, 16, 8)])
def test_kernels_convolve_a_batch(shape, layout):
    torch.manual_seed(0)
    pixels = image(*shape)
    weight = torch.randn(48, shape[1], 3, 3, device=DEVICE).to(memory_format=layout)
    taps = winograd._transformed_weight(weight, flipped=False).transpose(1, 2)
    output = winograd._convolve(pixels, taps, 48, largest=None)
    expected = F.conv2d(pixels.double(), weight.double(), padding=1)
    assert relative_error(output, expected) < 3e-3  # a direct convolution in bfloat16: 2.9e-3


@needs_triton
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_kernels_find_the_gradient_at_the_pixels_whatever_its_size(size):
    torch.manual_seed(0)
    gradient, weight = size * image(2, 48, 8, 12), torch.randn(48, 16, 3, 3, device=DEVICE)
    taps = winograd._transformed_weight(weight, flipped=True)
    largest = torch.linalg.vector_norm(gradient, float("inf"))
    found = winograd._convolve(gradient, taps, 16, largest=largest)
    expected = F.conv_transpose2d(gradient.double(), weight.double(), padding=1)
    assert relative_error(found, expected) < 3e-3


@needs_triton
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_find_the_gradient_at_the_weights(layout, size):
    torch.manual_seed(0)
    pixels, gradient = image(2, 16, 8, 12), size * image(2, 48, 8, 12)
    like = torch.empty(48, 16, 3, 3, device=DEVICE).to(memory_format=layout)
    found = winograd._weight_gradient(pixels, gradient, like=like)
    expected = torch.nn.grad.conv2d_weight(
        pixels.double(), like.shape, gradient.double(), padding=1
    )
    assert found.stride() == like.stride()
    assert relative_error(found, expected) < 3e-3


@needs_triton
def test_gradients_that_are_zero_or_no_numbers_stay_so():
    taps = winograd._transformed_weight(torch.randn(16, 16, 3, 3, device=DEVICE), flipped=True)
    for value in (0.0, float("nan"), float("inf")):
        gradient = torch.full((1, 16, 4, 4), value, device=DEVICE)
        largest = torch.linalg.vector_norm(gradient, float("inf"))
        found = winograd._convolve(gradient, taps, 16, largest=largest)
        assert bool((found == 0).all() if value == 0 else not found.isfinite().any())


def block_of(channels, **options):
    torch.manual_seed(0)
    block = ResNetBlock(channels, 32, time_embedding_dim=8, num_groups=4, **options)
    return block.to(DEVICE, memory_format=torch.channels_last)


def gradients_of(block, hidden, time):
    hidden = hidden.detach().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = block(hidden, time)
    output.float().square().sum().backward()
    return [output, hidden.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("way", ["pictures", "all"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_and_its_gradients_stay_as_they_were(frozen, way):
    plain, ours = block_of(16), block_of(16)
    use_winograd(ours, way)
    assert isinstance(ours.conv_1, WinogradConv2d)
    assert isinstance(ours.conv_2, WinogradConv2d)
    plain.requires_grad_(not frozen)
    ours.requires_grad_(not frozen)
    hidden, time = image(4, 16, 8, 8), torch.randn(4, 8, device=DEVICE)
    pairs = zip(gradients_of(ours, hidden, time), gradients_of(plain, hidden, time), strict=True)
    for mine, other in pairs:
        assert (mine is None) == (other is None)
        assert mine is None or mine.dtype == other.dtype
        assert mine is None or relative_error(mine, other) < 2e-2  # bfloat16's


def test_only_wide_3x3_convolutions_change_and_come_back():
    block = block_of(16, resampling="down")
    weights = dict(block.named_parameters())
    use_winograd(block, "pictures")
    changed = {name for name, part in block.named_modules() if isinstance(part, WinogradConv2d)}
    assert changed == {"conv_1", "conv_2"}
    assert all(weights[name] is weight for name, weight in block.named_parameters())
    with plain_convolutions(block):
        assert not any(isinstance(part, WinogradConv2d) for part in block.modules())
    assert isinstance(block.conv_1, WinogradConv2d)
    assert weights.keys() == dict(block.named_parameters()).keys()


def test_a_way_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="winograd=True is not allowed; use false, pictures or"):
        use_winograd(block_of(16), True)


def test_a_picture_that_does_not_suit_is_convolved_directly():
    conv = WinogradConv2d(16, 16, 3, padding=1)
    plain = nn.Conv2d(16, 16, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    odd = torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(odd), plain(odd))
    whole = torch.randn(4, 16, 8, 8)
    assert torch.equal(conv(whole), plain(whole))  # float32 stays exact
