"""What torch.compile is given: whole networks, each kind of block once, or the norms alone.

Shapes are compiled as they come: crops have one size, and a first small batch (DDP's rehearsal)
would otherwise turn every later kernel into one for any size.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ksr_distill.models import KSRUNet
from ksr_distill.models.blocks import ResNetBlock

C = TypeVar("C", bound=Callable[..., Any])

WAYS = (False, "networks", "blocks", "norms")
"""``compile_networks``: ``networks`` leaves the compiler most to fuse, and compiles for minutes;
``blocks`` compiles each kind of ResNet block once; ``norms`` compiles what lies between the
convolutions, where plain PyTorch reads and writes each pixel ten times, and begins soonest."""

KINDS_OF_BLOCKS = 128
"""Channels, sizes, with and without gradient, trained and frozen: 48 at full size."""


def compile_network(network: nn.Module, way: str) -> nn.Module:
    """Return a network, perhaps in its wrapper, as gradient-carrying forwards should call it."""
    if way in IN_PLACE:
        IN_PLACE[way](network)
        return network
    return cast(nn.Module, torch.compile(network, dynamic=False))


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks of a U-Net in place, and its last layers."""
    expect_parts()
    for part in network.modules():
        if isinstance(part, ResNetBlock):
            part.compile(dynamic=False)
        if isinstance(part, KSRUNet):
            part.finish = compile_function(KSRUNet.finish.__get__(part))  # type: ignore[method-assign]


def compile_norms(network: nn.Module) -> None:
    """Compile the norms of a U-Net's blocks in place, with what is done to their results."""
    expect_parts()
    for part in network.modules():
        if isinstance(part, ResNetBlock):
            part.norm_1.compile(dynamic=False)
            activated = ResNetBlock.activated.__get__(part)
            part.activated = compile_function(activated)  # type: ignore[method-assign]


IN_PLACE: dict[str, Callable[[nn.Module], None]] = {
    "blocks": compile_blocks,
    "norms": compile_norms,
}
"""Ways that leave a network as it is and compile parts of it."""


def expect_parts() -> None:
    """Let the compiler keep a version of a part for each kind of block, and no part be cut.

    Under DistributedDataParallel it cuts what it compiles into pieces of a bucket's size, so that
    gradients leave early. They leave part by part already, and a block's largest convolution alone
    is more than a bucket: each block would become several graphs, with nothing fused across them.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, KINDS_OF_BLOCKS)
    config.optimize_ddp = False


def compile_function(function: C) -> C:
    """Return a function, compiled."""
    return cast(C, torch.compile(cast(Any, function), dynamic=False))
