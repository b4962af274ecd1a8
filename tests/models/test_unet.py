"""The U-Net against the released one, and what it promises to trainers and samplers."""

import math

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from ksr_distill.models import KSRUNet, enlarge
from ksr_distill.models.blocks import ConvOfEnlarged, Enlarge, sinusoidal_embedding
from ksr_distill.models.unet import check_unet_config
from ksr_distill.models.weights import sr_unet_from_released
from tests.golden import golden_shapes, golden_weights, load_golden

TINY = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": (1, 2),
        "time_embedding_dim": 16, "num_groups": 4}  # fmt: skip


def inputs(batch=2, side=16):
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(batch, 3, side, side, generator=generator)
    lowres = torch.rand(batch, 3, side // 2, side // 2, generator=generator) * 2 - 1
    return x_t, torch.tensor([979, 229][:batch]), lowres


@torch.no_grad()
def test_it_agrees_with_the_released_network():
    recorded, _ = load_golden("sr_unet")
    unet = sr_unet_from_released(golden_weights(golden_shapes("tiny_state_dicts/sr_unet"))).eval()
    output = unet(recorded["x"], recorded["time"], recorded["lowres"])
    assert (output - recorded["out"]).abs().max() < 1e-4


def test_full_size_has_the_released_parameters():
    with torch.device("meta"):
        unet = KSRUNet()
    assert sum(p.numel() for p in unet.parameters()) == 413_205_251
    assert unet.level_channels == (128, 256, 512, 1024)
    assert unet.stride == 8


@torch.no_grad()
def test_taps_lie_at_half_quarter_eighth_and_eighth():
    unet = KSRUNet(**{**TINY, "channel_multipliers": (1, 2, 4, 8), "num_blocks": (1, 1, 1, 1)})
    levels = unet.encode(*inputs(side=32)).levels
    assert [tuple(level.shape[1:]) for level in levels] == [
        (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 4, 4)
    ]  # fmt: skip


@torch.no_grad()
def test_forward_is_decode_of_encode():
    unet = KSRUNet(**TINY).eval()
    assert torch.equal(unet(*inputs()), unet.decode(unet.encode(*inputs())))


@torch.no_grad()
def test_residual_prediction_starts_as_bilinear_enlargement():
    x_t, t, lowres = inputs()
    enlarged = torch.nn.functional.interpolate(lowres, scale_factor=2, mode="bilinear")
    assert torch.equal(KSRUNet(**TINY, predict_residual=True)(x_t, t, lowres), enlarged)


def test_sinusoid_is_computed_in_float32_from_integers():
    exact = sinusoidal_embedding(torch.tensor([979]), 32)
    assert exact.dtype == torch.float32
    assert exact[0, 0].item() == pytest.approx(math.sin(979), abs=1e-4)
    assert exact[0, -1].item() == pytest.approx(math.cos(979 / 10000), abs=1e-6)


@torch.no_grad()
def test_half_precision_keeps_the_time_embedding_within_one_percent():
    unet = KSRUNet(**TINY).eval()
    x_t, t, lowres = inputs()
    exact = unet(x_t, t, lowres)
    half = unet.to(torch.bfloat16)(x_t, t, lowres)
    assert (half.float() - exact).norm() / exact.norm() < 0.03


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient():
    gradients, runs_of_a_block = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet = KSRUNet(**TINY)
        unet.down_levels[0][0].register_forward_pre_hook(
            lambda *_, way=checkpointing: runs_of_a_block.append(way)
        )
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    assert runs_of_a_block == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_odd_sides_are_refused_with_the_stride():
    with pytest.raises(ValueError, match="17×16 px, but both sides must be multiples of 2"):
        KSRUNet(**TINY)(torch.zeros(1, 3, 16, 17), torch.zeros(1), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"num_groups": 3}, "model.num_groups=3"), ({"num_groups": 0}, "model.num_groups=0"),
     ({"base_channels": -4}, r"the channels \[-4, -4, -8\]"),
     ({"num_blocks": (1,)}, "model.num_blocks"),
     ({"num_blocks": (0, 1)}, "whole numbers from 1 to 1000"),
     ({"num_blocks": (1, 10**9)}, "whole numbers from 1 to 1000")],
)  # fmt: skip
def test_impossible_layouts_are_refused_by_key(change, key):
    with pytest.raises(ValueError, match=key):
        KSRUNet(**{**TINY, **change})


def test_unknown_ways_to_double_the_size_are_refused_by_key():
    with pytest.raises(
        ValueError, match="'bicubic' is not allowed; use transposed_conv or nearest"
    ):
        check_unet_config((8, 8), (1,), 4, "bicubic")


@torch.no_grad()
def test_folder_gives_the_same_pixels(tmp_path):
    unet = KSRUNet(**TINY, upsampling="nearest").eval()
    unet.save_pretrained(tmp_path)
    assert torch.equal(KSRUNet.from_pretrained(tmp_path)(*inputs()), unet(*inputs()))


@torch.no_grad()
def test_a_convolution_of_repeated_pixels_needs_no_repeated_pixels():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    frugal = ConvOfEnlarged(3, 5, 3, padding=1).double()
    frugal.load_state_dict(conv.state_dict())
    small = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = conv(Enlarge()(small))
    torch.testing.assert_close(frugal(small), expected, rtol=0, atol=1e-14)


@torch.no_grad()
def test_weights_may_come_and_go_with_each_layers_call():
    unet = KSRUNet(**TINY, upsampling="nearest", predict_residual=True).eval()
    expected = unet(*inputs())
    cpu_offload(unet, execution_device=torch.device("cpu"))  # as in sequential offload
    assert {weight.device.type for weight in unet.parameters()} == {"meta"}
    assert torch.equal(unet(*inputs()), expected)


def test_lowres_may_be_enlarged_before():
    unet = KSRUNet(**TINY, predict_residual=True)
    nn.init.normal_(unet.conv_out.weight)
    x_t, lowres = torch.randn(2, 3, 16, 24), torch.rand(2, 3, 4, 6)
    t = torch.tensor([979, 3])
    assert torch.equal(unet(x_t, t, lowres), unet(x_t, t, enlarge(lowres, x_t)))


@pytest.mark.parametrize("content", ["[]", "null", '"elsewhere"'])
def test_a_config_that_is_no_object_is_one_line(tmp_path, content):
    KSRUNet(**TINY).save_pretrained(tmp_path / "sr")
    (tmp_path / "sr" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"sr/config\.json holds .*, not an object; copy") as error:
        KSRUNet.from_pretrained(tmp_path, subfolder="sr")
    assert "\n" not in str(error.value)
