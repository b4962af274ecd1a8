import warnings

import pytest
import torch
from diffusers import Kandinsky3UNet

from ksr_distill.models import RefinerContext, RefinerUNet
from ksr_distill.models.weights import refiner_from_released
from tests.golden import golden_shapes, golden_weights, load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("refiner_unet")[0]


@pytest.fixture(scope="module")
def refiner():
    return refiner_from_released(golden_weights(golden_shapes("tiny_state_dicts/refiner_unet")))


@torch.no_grad()
def test_one_forward_equals_the_released_code(refiner, golden):
    out = refiner(golden["x"], golden["time"], golden["context"], golden["context_mask"]).sample
    assert (out - golden["out"]).abs().max() < 1e-4


@torch.no_grad()
def test_no_mask_keeps_every_token(refiner, golden):
    inputs = golden["x"], golden["time"], golden["context"]
    ones = torch.ones_like(golden["context_mask"])
    assert torch.equal(refiner(*inputs).sample, refiner(*inputs, ones).sample)


@torch.no_grad()
def test_padding_beside_one_valid_token_changes_nothing(refiner, golden):
    x, time, context = (golden[key].double() for key in ("x", "time", "context"))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 0] = True
    in_double = refiner_from_released(
        {
            name: value.double()
            for name, value in golden_weights(
                golden_shapes("tiny_state_dicts/refiner_unet")
            ).items()
        }
    )

    padded = in_double(x, time, context, mask).sample
    alone = in_double(x, time, context[:, :1]).sample

    assert (padded - alone).abs().max() < 1e-10


def test_a_forward_without_context_says_what_to_pass(refiner, golden):
    with pytest.raises(ValueError, match=r"RefinerContext\.tokens"):
        refiner(golden["x"], golden["time"])


@torch.no_grad()
def test_the_folder_gives_the_same_outputs_and_no_warning(refiner, golden, tmp_path, caplog):
    refiner.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = RefinerUNet.from_pretrained(tmp_path)

    assert "not expected" not in caplog.text
    assert {k: loaded.config[k] for k in refiner.config if k[0] != "_"} == {
        k: v for k, v in refiner.config.items() if k[0] != "_"
    }
    inputs = golden["x"], golden["time"], golden["context"], golden["context_mask"]
    assert torch.allclose(refiner(*inputs).sample, loaded(*inputs).sample, atol=1e-6)


def test_the_stride_is_that_of_the_levels(refiner):
    assert refiner.stride == 2


@torch.no_grad()
def test_with_four_levels_it_is_the_class_of_diffusers():
    torch.manual_seed(0)
    config = {
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "groups": 8,
        "attention_head_dim": 16,
        "time_embedding_dim": 32,
        "cross_attention_dim": 16,
    }
    original = Kandinsky3UNet(**config, encoder_hid_dim=16).eval()
    original.encoder_hid_proj = torch.nn.Identity()
    ours = RefinerUNet(**config, encoder_hid_dim=16).eval()
    ours.load_state_dict(original.state_dict())
    inputs = torch.rand(1, 4, 16, 16), torch.tensor([229]), torch.rand(1, 3, 16)

    theirs = original(*inputs, encoder_attention_mask=torch.ones(1, 3)).sample

    assert torch.equal(ours(*inputs).sample, theirs)
    assert ours.stride == 8


def test_a_depth_for_each_level_is_wanted():
    with pytest.raises(ValueError, match="give both one entry for each level"):
        RefinerUNet(layers_per_block=[1, 1, 1], block_out_channels=[32, 64], groups=8)


def test_the_context_is_a_model_with_one_token(tmp_path):
    context = RefinerContext(dim=16)
    context.tokens.data.uniform_()
    context.save_pretrained(tmp_path)
    assert torch.equal(RefinerContext.from_pretrained(tmp_path).tokens, context.tokens)
