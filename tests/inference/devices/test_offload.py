import torch

from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.inference.acceleration import accelerate
from ksr_distill.inference.devices.offload import take_turns
from ksr_distill.models import RefinerContext
from tests.inference.acceleration.test_acceleration import make_movq, make_refiner
from tests.inference.conftest import make_unet, photo_like


def picture(pipeline):
    image = photo_like(16, 24) / 2 + 0.5
    generator = torch.Generator().manual_seed(0)
    return pipeline(image, refine_steps=1, generator=generator, output_type="pt").images


def test_networks_that_take_turns_make_the_same_picture_and_only_one_is_there():
    networks = (make_unet(), make_refiner().float(), make_movq().float())
    pipeline = KSRFlashPipeline(*networks, RefinerContext(64))
    expected = picture(pipeline)
    accelerate(*networks)
    take_turns(pipeline, torch.device("cpu"))
    turns = [network._hf_hook for network in networks]
    there = []
    for network, turn in zip(networks, turns, strict=True):
        original = turn.pre_forward

        def watched(module, *args, original=original, **kwargs):
            result = original(module, *args, **kwargs)
            there.append([t.is_on for t in turns].index(True))
            assert sum(t.is_on for t in turns) == 1
            return result

        turn.pre_forward = watched
        assert not turn.is_on
        assert network.device.type == "cpu"
    assert (picture(pipeline) - expected).abs().max() < 1e-4
    assert sorted(set(there)) == [0, 1, 2]
    assert (picture(pipeline) - expected).abs().max() < 1e-4
    assert pipeline._execution_device == torch.device("cpu")
