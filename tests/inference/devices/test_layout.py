import torch
from torch import nn

from ksr_distill.inference.acceleration import accelerate, restore
from ksr_distill.inference.devices.layout import lay_out
from ksr_distill.inference.model_folders.loading import load_pipeline


def lies(network, memory_format):
    weights = (parameter for parameter in network.parameters() if parameter.ndim == 4)
    return all(weight.is_contiguous(memory_format=memory_format) for weight in weights)


def test_the_memory_format_changes_there_and_back_and_the_weights_do_not():
    networks = [nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)) for _ in range(2)]
    before = [parameter.clone() for network in networks for parameter in network.parameters()]
    for memory_format in (torch.channels_last, torch.contiguous_format):
        lay_out(*networks, memory_format=memory_format)
        assert all(lies(network, memory_format) for network in networks)
        after = [parameter for network in networks for parameter in network.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_weights_lie_channels_last_on_a_cpu_and_under_the_fast_operations(model_folder):
    unet = load_pipeline(model_folder, device=torch.device("cpu")).sr
    assert lies(unet, torch.channels_last)
    restore(unet)
    assert lies(unet, torch.contiguous_format)
    accelerate(unet)
    assert lies(unet, torch.channels_last)
