"""The group norm that compiled training takes is PyTorch's, and its gradients are."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ksr_distill.models import KSRUNet
from ksr_distill.models.norms import GroupNorm, group_norm_by_channels


def inputs(offset=0.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 12, 6, 5, generator=generator, dtype=torch.float64)
    hidden = hidden * torch.rand(12, generator=generator, dtype=torch.float64)[:, None, None] * 3
    weight, bias = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    return (hidden + offset).float(), weight.float(), bias.float()


@pytest.mark.parametrize("num_groups", [1, 3, 12])
def test_by_channels_gives_the_norm_and_its_gradients(num_groups):
    ours = [each.requires_grad_() for each in inputs()]
    exact = [each.detach().double().requires_grad_() for each in ours]
    norm = group_norm_by_channels(ours[0], num_groups, ours[1], ours[2], eps=1e-5)
    reference = F.group_norm(exact[0], num_groups, exact[1], exact[2], 1e-5)
    assert (norm - reference).abs().max() < 1e-5
    cotangent = torch.randn(norm.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((norm * cotangent).sum(), ours)
    references = torch.autograd.grad((reference * cotangent.double()).sum(), exact)
    for gradient, wanted in zip(gradients, references, strict=True):
        assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_by_channels_survives_means_far_from_zero():
    hidden, weight, bias = inputs(offset=300.0)
    norm = group_norm_by_channels(hidden, 3, weight, bias, eps=1e-5)
    reference = F.group_norm(hidden.double(), 3, weight.double(), bias.double(), 1e-5)
    assert (norm - reference).abs().max() < 2e-3


@pytest.fixture
def compiling(monkeypatch):
    """Let the code take the compiler's path; the shape checks of tests cannot be compiled."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_the_type_is_the_inputs(compiling):
    layer = GroupNorm(3, 12).bfloat16()
    hidden = inputs()[0].bfloat16()
    eager = layer(hidden)
    compiling()
    compiled = layer(hidden)
    assert compiled.dtype == eager.dtype == torch.bfloat16
    assert (compiled.float() - eager.float()).abs().max() < 3e-2


def test_a_network_keeps_its_names_and_its_function(compiling):
    torch.manual_seed(0)
    unet = KSRUNet(8, channel_multipliers=(1, 2), num_blocks=(1, 1), num_groups=4,
                   time_embedding_dim=16)  # fmt: skip
    arguments = torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.randn(1, 3, 8, 8)
    eager = unet(*arguments)
    compiling()
    assert 0 < (unet(*arguments) - eager).abs().max() < 1e-5
    assert "norm_out.weight" in unet.state_dict()


@pytest.mark.slow
def test_a_compiled_network_is_one_graph_without_pytorchs_norm():
    code = """
import torch
from ksr_distill.models import KSRUNet
unet = KSRUNet(8, channel_multipliers=(1, 2), num_blocks=(1, 1), num_groups=4)
arguments = torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.randn(1, 3, 8, 8)
def backend(graph, _):
    assert "group_norm(" not in graph.code.replace("group_norm_by_channels(", "")
    return graph
torch.testing.assert_close(torch.compile(unet, backend=backend, fullgraph=True)(*arguments),
                           unet(*arguments), atol=1e-5, rtol=0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
