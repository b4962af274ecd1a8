import pytest
import torch
from accelerate import cpu_offload
from diffusers import VQModel
from torch import nn

from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.inference.acceleration import accelerate, can_accelerate, operations, restore
from ksr_distill.inference.acceleration import movq as fast_movq
from ksr_distill.inference.model_folders import loading
from ksr_distill.inference.model_folders.loading import load_pipeline, runs_fast
from ksr_distill.models import RefinerContext, RefinerUNet
from ksr_distill.models.movq import MOVQ_CONFIG, decode, encode
from tests.inference.conftest import make_unet, photo_like


def draw_all(network):
    """Let no bias and no scale be zero or one: every term counts."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return network.double().eval()


def make_movq():
    torch.manual_seed(0)
    levels = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    return draw_all(VQModel(**MOVQ_CONFIG | levels))


def make_refiner():
    torch.manual_seed(0)
    return draw_all(
        RefinerUNet(
            block_out_channels=(64, 64, 128),
            layers_per_block=2,
            time_embedding_dim=32,
            cross_attention_dim=64,
            groups=4,
            attention_head_dim=16,
        )
    )


@torch.no_grad()
def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": (1, 3), "base_channels": 16},
        {"upsampling": "nearest", "channel_multipliers": (1, 2, 2), "num_blocks": (1, 2, 2)},
        {"predict_residual": True},
    ],
)
def test_the_fast_unet_is_the_unet(options):
    unet = draw_all(make_unet(**options))
    x_t, lowres = torch.randn(2, 3, 24, 32).double(), torch.randn(2, 3, 12, 16).double()
    t = torch.tensor([979, 229])
    with torch.no_grad():
        expected = unet(x_t, t, lowres)
    accelerate(unet)
    tolerance = 1e-6 if unet.config.predict_residual else 1e-13  # that sum is in float32
    assert relative_error(unet(x_t, t, lowres), expected) < tolerance


def test_the_fast_movq_is_movq(monkeypatch):
    monkeypatch.setattr(fast_movq, "SCORE_BYTES", 5000)  # attention in several bands
    movq, picture = make_movq(), torch.randn(2, 3, 24, 32).double()
    latents = encode(movq, picture)
    expected = decode(movq, latents)
    accelerate(movq)
    assert relative_error(encode(movq, picture), latents) < 1e-6  # both end in float32
    assert relative_error(decode(movq, latents), expected) < 1e-6
    assert relative_error(fast_movq.encode(movq, picture).float(), latents) < 1e-6


def test_the_fast_refiner_is_the_refiner():
    refiner = make_refiner()
    latents, token = torch.randn(2, 4, 16, 24).double(), torch.randn(1, 1, 64).double()
    t, tokens = torch.tensor([229, 479]), token.expand(2, -1, -1)
    with torch.no_grad():
        expected = refiner(latents, t, tokens).sample
    accelerate(refiner)
    assert relative_error(refiner(latents, t, tokens).sample, expected) < 1e-13


def test_the_fast_refiner_refuses_what_it_would_get_wrong():
    refiner = make_refiner()
    accelerate(refiner)
    with pytest.raises(ValueError, match="one token and no mask, not 2"):
        refiner(
            torch.randn(1, 4, 8, 8).double(), torch.tensor([229]), torch.randn(1, 2, 64).double()
        )


def test_movq_without_its_codebook_cannot_be_decoded_by_mistake():
    movq = make_movq()
    accelerate(movq)
    with pytest.raises(ValueError, match="force_not_quantize=False"):
        movq.decode(torch.zeros(1, 4, 8, 8).double(), force_not_quantize=False)


def test_an_accelerated_pipeline_makes_the_same_picture_and_keeps_its_weights():
    unet, movq, refiner = make_unet(), make_movq().float(), make_refiner().float()
    networks = (unet, movq, refiner)
    context = RefinerContext(64)
    nn.init.normal_(context.tokens)
    pipeline = KSRFlashPipeline(unet, refiner, movq, context)
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]

    def picture():
        generator = torch.Generator().manual_seed(0)
        image = photo_like(16, 24) / 2 + 0.5
        return pipeline(image, refine_steps=1, generator=generator, output_type="pt").images

    expected = picture()
    accelerate(*networks)
    assert (picture() - expected).abs().max() < 1e-4
    for network, weights in zip(networks, before, strict=True):
        state = network.state_dict()
        assert list(state) == list(weights)
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    restore(*networks)
    assert torch.equal(picture(), expected)


def test_an_accelerated_pipeline_can_be_saved(tmp_path):
    unet = make_unet()
    accelerate(unet)
    KSRFlashPipeline(unet).save_pretrained(tmp_path)
    again = KSRFlashPipeline.from_pretrained(tmp_path).sr
    assert all(
        torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True)
    )


def test_a_cpu_is_left_alone():
    assert not can_accelerate(torch.device("cpu"))
    assert not operations.has_kernels(torch.zeros(1, 4, 8, 8, dtype=torch.float16))


def test_a_pending_bias_reaches_the_next_norm():
    norm, conv = nn.GroupNorm(2, 4).double(), nn.Conv2d(3, 4, 3, padding=1).double()
    pixels = torch.randn(1, 3, 8, 8).double()
    features = operations.convolve(pixels, conv)
    assert features.pending_bias is not None
    ready = operations.Norm(operations.norm_factors(features, norm), silu=True)
    expected = torch.nn.functional.silu(norm(conv(pixels)))
    assert relative_error(operations.apply_norm(features.pixels, ready), expected) < 1e-13


def test_winograd_is_for_wide_half_precision_3x3_convolutions():
    pixels = torch.zeros(1, 512, 64, 64, dtype=torch.float16)
    wide = nn.Conv2d(512, 512, 3, padding=1)
    assert operations.prefers_winograd(wide, pixels)
    assert not operations.prefers_winograd(wide, pixels.bfloat16())  # would lose 2e-2
    assert not operations.prefers_winograd(nn.Conv2d(512, 64, 3, padding=1), pixels)
    assert not operations.prefers_winograd(nn.Conv2d(512, 512, 1), pixels)
    assert not operations.prefers_winograd(nn.Conv2d(512, 512, 3, 2, 1), pixels)


def test_weights_that_are_filled_in_layer_by_layer_take_the_plain_way():
    unet = make_unet()
    x_t, lowres, t = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8), torch.tensor([979])
    with torch.no_grad():
        expected = unet(x_t, t, lowres)
    accelerate(unet)
    cpu_offload(unet, torch.device("cpu"))
    assert next(unet.parameters()).is_meta
    with torch.no_grad():
        assert (unet(x_t, t, lowres) - expected).abs().max() < 1e-5


def test_the_fast_way_is_refused_where_there_is_none(model_folder):
    with pytest.raises(ValueError, match="--fast does not fit --device cpu"):
        load_pipeline(model_folder, device=torch.device("cpu"), fast=True)


def test_a_device_without_kernels_runs_the_plain_modules(caplog):
    assert not runs_fast(torch.device("cpu"))
    assert not caplog.records


def test_kernels_that_cannot_be_built_are_named_and_left_out(monkeypatch, caplog):
    monkeypatch.setattr(loading, "can_accelerate", lambda _: True)
    monkeypatch.setattr(loading, "why_kernels_fail", lambda _: "no C compiler")
    assert not runs_fast(torch.device("cuda"))
    assert "the plain modules run" in caplog.text
    assert "no C compiler" in caplog.text
