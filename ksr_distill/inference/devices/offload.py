"""For small GPUs: one network at a time is on the device, the others in pinned memory."""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline, ModelMixin


class Turn(ModelHook):
    """Brings a network's weights to the device before it is used, and frees its predecessor's.

    Weights do not change here, so nothing is ever copied back: diffusers' model offload does that,
    through pageable memory.
    """

    def __init__(self, network: ModelMixin, device: torch.device) -> None:
        self.execution_device = device
        self.others: list[Turn] = []
        self.tensors = [*network.parameters(), *network.buffers()]
        self.at_rest = [_page_locked(tensor.data, device) for tensor in self.tensors]
        self.is_on = True
        self.end()

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG002
        """Begin the turn; accelerate calls this before the network."""
        if not self.is_on:
            for other in self.others:
                other.end()
            for tensor, at_rest in zip(self.tensors, self.at_rest, strict=True):
                tensor.data = at_rest.to(self.execution_device, non_blocking=True)
            self.is_on = True
        return args, kwargs

    def end(self) -> None:
        """Free the device's copy."""
        if self.is_on:
            for tensor, at_rest in zip(self.tensors, self.at_rest, strict=True):
                tensor.data = at_rest
            self.is_on = False


def take_turns(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Keep one network at a time on the device. Called last: the weights are fixed from then on."""
    turns = []
    for name in str(pipeline.model_cpu_offload_seq).split("->"):
        network = getattr(pipeline, name, None)
        if network is not None:
            turns.append(Turn(network, device))
            add_hook_to_module(network, turns[-1])
    for turn in turns:
        turn.others = [other for other in turns if other is not turn]


def _page_locked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    tensor = tensor.cpu()
    return tensor.pin_memory() if device.type == "cuda" else tensor
