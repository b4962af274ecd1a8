"""What torch.compile compiles: whole networks, each kind of block once, or only the norms.

Always with ``dynamic=False``: all crops have one size, and after one smaller batch (DDP's
dummy backward) torch.compile would otherwise make every kernel shape-generic, which is slower.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ksr_distill.models import KSRUNet
from ksr_distill.models.blocks import ResNetBlock

C = TypeVar("C", bound=Callable[..., Any])

WAYS = (False, "networks", "blocks", "norms")
"""Values of ``compile_networks``. ``networks`` can fuse most, and compiles for minutes; ``blocks``
compiles each kind of ResNet block once; ``norms`` compiles only what lies between the convolutions,
where eager PyTorch reads and writes each pixel ten times, and starts soonest."""

KINDS_OF_BLOCKS = 128
"""At least the combinations of channels, sizes, gradient and frozen or not: 48 at full size."""


def compile_network(network: nn.Module, way: str) -> nn.Module:
    """Return the network (it may be wrapped in DDP) as forwards with gradients should call it."""
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
    """Allow a compiled version for each kind of block, and keep DDP from splitting them.

    With ``optimize_ddp`` the compiler splits graphs at DDP's bucket size, so that gradients leave
    early. Here they leave block by block anyway, and a block's largest convolution alone exceeds a
    bucket: each block would become several graphs, with nothing fused across them.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, KINDS_OF_BLOCKS)
    config.optimize_ddp = False


def compile_function(function: C) -> C:
    """Return a function, compiled."""
    return cast(C, torch.compile(cast(Any, function), dynamic=False))
