import torch
from diffusers import ModelMixin

from ksr_distill.models import KSRUNet
from ksr_distill.models.weights import sr_unet_from_released
from tests.golden import golden_shapes, golden_weights


def offsets(unet):
    return {parameter.data_ptr() % 64 for parameter in unet.parameters()}


@torch.no_grad()
def test_a_loaded_unet_computes_what_the_saved_one_did(tmp_path):
    unet = sr_unet_from_released(golden_weights(golden_shapes("tiny_state_dicts/sr_unet")))
    unet.save_pretrained(tmp_path)
    as_diffusers_does = ModelMixin.from_pretrained.__func__(KSRUNet, tmp_path)
    assert offsets(as_diffusers_does) != {0}  # or this test shows nothing

    loaded, info = KSRUNet.from_pretrained(tmp_path, output_loading_info=True)

    assert offsets(loaded) == offsets(KSRUNet.from_pretrained(tmp_path)) == {0}
    assert not any(info.values())
    inputs = torch.rand(1, 3, 32, 32), torch.tensor([229]), torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(*inputs), unet(*inputs))
