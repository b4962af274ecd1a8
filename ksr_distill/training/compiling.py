"""What torch.compile is given: whole networks, each kind of block once, or CUDA graphs.

Shapes are compiled as they come: crops have one size, and a first small batch (DDP's rehearsal)
would otherwise turn every later kernel into one for any size.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ksr_distill.models import KSRUNet
from ksr_distill.models.blocks import ResNetBlock

C = TypeVar("C", bound=Callable[..., Any])

WAYS = (False, "networks", "blocks", "graphs")
"""``compile_networks``: ``networks`` runs fastest and compiles for minutes at full size; ``blocks``
compiles each kind of ResNet block once and loses a few per cent; ``graphs`` replays a whole network
as a CUDA graph, for small ones whose kernels are shorter than the host needs to launch them."""

KINDS_OF_BLOCKS = 128
"""Channels, sizes, with and without gradient, trained and frozen: 48 at full size."""


def compile_network(network: nn.Module, way: str) -> nn.Module:
    """Return a network, perhaps in its wrapper, as gradient-carrying forwards should call it."""
    if way == "blocks":
        compile_blocks(network)
        return network
    # DDP's hooks must see gradients where they put them, not in a graph's own memory.
    has_graph = way == "graphs" and not isinstance(network, DistributedDataParallel)
    mode = "reduce-overhead" if has_graph else None
    return cast(nn.Module, torch.compile(network, dynamic=False, mode=mode))


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks of a U-Net in place, and its last layers."""
    limit: Any = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, KINDS_OF_BLOCKS)
    for part in network.modules():
        if isinstance(part, ResNetBlock):
            part.compile(dynamic=False)
        if isinstance(part, KSRUNet):
            finish = KSRUNet.finish.__get__(part)
            part.finish = torch.compile(finish, dynamic=False)  # type: ignore[method-assign]


def compile_function(function: C) -> C:
    """Return a function, compiled."""
    return cast(C, torch.compile(cast(Any, function), dynamic=False))
