from functools import cache

import pytest
import torch
from diffusers import Kandinsky3UNet

from ksr_distill.models import KSRUNet
from ksr_distill.models.weights import (
    context_from_released,
    movq_from_released,
    refiner_from_released,
    released_state_dict,
    sr_unet_from_released,
)
from tests.golden import golden_shapes, golden_weights, load_golden

FROM_RELEASED = {
    "sr_unet": sr_unet_from_released,
    "refiner_unet": refiner_from_released,
    "movq": movq_from_released,
}
NUM_PARAMETERS = {"sr_unet": 413_205_251, "refiner_unet": 3_038_562_820, "movq": 270_603_567}


@cache
def tiny_weights(name):
    return golden_weights(golden_shapes(f"tiny_state_dicts/{name}"))


def tiny(name):
    return dict(tiny_weights(name))


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", FROM_RELEASED)
def test_every_full_size_name_and_shape_is_mapped_and_mapped_back(name):
    shapes = golden_shapes(f"{name}_full_state_dict")

    model = FROM_RELEASED[name](on_meta(shapes))

    back = {key: list(value.shape) for key, value in released_state_dict(model).items()}
    assert back == shapes
    num_in_codebook = 4 if name == "movq" else 0
    counted = sum(p.numel() for p in model.parameters()) - num_in_codebook
    assert counted == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", FROM_RELEASED)
def test_weights_come_back_bit_for_bit(name):
    released = tiny(name)

    back = released_state_dict(FROM_RELEASED[name](released))

    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], value) for key, value in released.items())


def test_the_unet_equals_the_released_code():
    golden, _ = load_golden("sr_unet")
    with torch.no_grad():
        out = sr_unet_from_released(tiny("sr_unet"))(golden["x"], golden["time"], golden["lowres"])
    assert (out - golden["out"]).abs().max() < 1e-4


def test_the_full_size_configs_are_the_classes_defaults():
    refiner = refiner_from_released(on_meta(golden_shapes("refiner_unet_full_state_dict")))
    with torch.device("meta"):
        default_refiner, default_unet = Kandinsky3UNet(), KSRUNet()
    unet = sr_unet_from_released(on_meta(golden_shapes("sr_unet_full_state_dict")))

    def settings(model):
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in model.config.items()
            if not key.startswith("_")
        }

    assert settings(refiner) == settings(default_refiner)
    assert settings(unet) == settings(default_unet)


def test_group_counts_and_head_sizes_can_be_given():
    assert sr_unet_from_released(tiny("sr_unet")).config.num_groups == 8
    assert sr_unet_from_released(tiny("sr_unet"), num_groups=16).config.num_groups == 16
    refiner = refiner_from_released(tiny("refiner_unet"), num_groups=16, head_dim=32)
    assert (refiner.config.groups, refiner.config.attention_head_dim) == (16, 32)
    assert movq_from_released(tiny("movq"), num_groups=8).config.norm_num_groups == 8


@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 2), (1, 1, 3, 3)])
@pytest.mark.parametrize("stem", [None, 16])
def test_any_unet_of_ours_survives_the_released_layout(multipliers, stem):
    torch.manual_seed(1)
    config = {
        "base_channels": 8,
        "stem_channels": stem,
        "channel_multipliers": multipliers,
        "num_blocks": [2 + level % 2 for level in range(len(multipliers))],
        "time_embedding_dim": 12,
        "num_groups": 2,
    }
    unet = KSRUNet(**config).eval()
    x_t, lowres = torch.rand(2, 1, 3, 16, 24)
    t = torch.tensor([479])

    again = sr_unet_from_released(released_state_dict(unet), num_groups=2)

    with torch.no_grad():
        assert torch.equal(unet(x_t, t, lowres), again(x_t, t, lowres))


@pytest.mark.parametrize("option", [{"predict_residual": True}, {"upsampling": "nearest"}], ids=str)
def test_what_the_released_code_cannot_compute_is_not_written_for_it(option):
    tiny_config = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": (2, 2)}
    unet = KSRUNet(**tiny_config, time_embedding_dim=8, num_groups=2, **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        released_state_dict(unet)


def test_a_missing_name_is_named():
    weights = tiny("sr_unet")
    del weights["down_samples.1.resnet_attn_blocks.2.0.out_block.projection.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(down_samples\.1\..*projection\.bias\)"):
        sr_unet_from_released(weights)


def test_an_unknown_name_is_named():
    weights = tiny("movq") | {"loss.perceptual.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unknown \(loss\.perceptual\.weight\)"):
        movq_from_released(weights)


def test_a_wrong_shape_is_named_with_both_shapes():
    weights = tiny("refiner_unet")
    weights["out_layer.2.weight"] = torch.zeros(4, 32, 1, 1)
    message = r"1 of another shape \(out_layer\.2\.weight is \(4, 32, 1, 1\), not \(4, 32, 3, 3\)\)"
    with pytest.raises(ValueError, match=message):
        refiner_from_released(weights)


def test_many_differences_are_counted_and_three_are_shown():
    weights = {f"{name}.old": value for name, value in tiny("sr_unet").items()}
    with pytest.raises(ValueError, match=r"128 unknown \(\S+, \S+, \S+, …\)"):
        sr_unet_from_released(weights | tiny("sr_unet"))


def test_a_level_index_of_a_billion_costs_nothing():
    name = "down_samples.1000000000.resnet_attn_blocks.0.0.time_mlp.1.weight"
    with pytest.raises(ValueError, match="the levels of"):
        sr_unet_from_released(tiny("sr_unet") | {name: torch.zeros(1)})


def test_half_precision_files_stay_half():
    halves = {name: value.half() for name, value in tiny("movq").items()}
    assert movq_from_released(halves).dtype == torch.float16
    mixed = halves | {"quant_conv.bias": torch.zeros(4)}
    assert {p.dtype for p in movq_from_released(mixed).parameters()} == {torch.float32}


def test_the_context_keeps_the_one_token_that_the_mask_keeps():
    context = torch.rand(1, 5, 16)
    mask = torch.tensor([[0, 0, 1, 0, 0]])
    assert torch.equal(context_from_released(context, mask).tokens, context[:, 2:3])


def test_a_context_without_its_mask_must_look_like_one_token_and_padding():
    context = torch.rand(1, 5, 16)
    with pytest.raises(ValueError, match="--mask"):
        context_from_released(context)
    context[:, 1:] = context[:, 1:2].clone()
    assert torch.equal(context_from_released(context).tokens, context[:, :1])


def test_a_context_of_two_tokens_cannot_be_cut():
    with pytest.raises(ValueError, match="keeps 2 tokens"):
        context_from_released(torch.rand(1, 3, 8), torch.tensor([[1, 1, 0]]))
