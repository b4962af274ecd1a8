"""FSDP2: weights, gradients, averages and optimiser states are sharded over the processes.

Every ResNet block of a U-Net is one `fully_shard` group and the rest of the network another.
Results, checkpoints and resuming are those of PerNetworkDDP: a checkpoint holds whole tensors, so a
run may continue with the other strategy or on another number of processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from ksr_distill.models import Critic, KSRUNet
from ksr_distill.models.blocks import ResNetBlock
from ksr_distill.training.strategy import PerNetworkDDP


class PerNetworkFSDP(PerNetworkDDP):
    """Shards every U-Net: trained, averaged and frozen. The critic's heads stay under DDP.

    The heads are small, and R1 needs a second derivative through them, which FSDP2 cannot give.
    """

    @override
    def configure_ddp(self) -> None:
        """Wrap the trained networks, then shard the U-Nets that are not trained."""
        self._mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        super().configure_ddp()
        module = cast(nn.Module, self.lightning_module)
        for network in module.modules():
            if isinstance(network, KSRUNet) and not isinstance(network, FSDPModule):
                self._shard(network)
        for part in module.modules():
            if isinstance(part, Critic):
                look_through_shards(part)

    @override
    def teardown(self) -> None:
        """Finish, but leave shards on their devices: Lightning would move modules to the CPU."""
        module, self._lightning_module = self._lightning_module, None
        self.optimizers = []
        super().teardown()
        self._lightning_module = module

    @override
    def wrap_network(self, network: nn.Module) -> nn.Module:
        """Return the wrapper that gradient-carrying forwards go through."""
        if isinstance(network, KSRUNet):
            return ShardedNetwork(self._shard(network))
        return super().wrap_network(network)

    def _shard(self, unet: KSRUNet) -> KSRUNet:
        shard_unet(unet, self._mesh, self._mixed_precision())
        return unet

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        """Gather weights in the type that autocast would turn them into; reduce in float32."""
        plugin = self.precision_plugin
        is_bf16 = isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed"
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the enlarged lowres is added in full precision
        )

    # ---- validation: ranks may have different numbers of batches ---------------------------------

    @override
    def on_validation_start(self) -> None:
        """Gather the networks that validation uses, so that its batches need no other rank."""
        for network in self._sampled_networks():
            network.set_reshard_after_forward(False)
            side = 8 * network.stride
            image = torch.zeros(1, 3, side, side, device=self.root_device)
            t = torch.zeros(1, dtype=torch.int64, device=self.root_device)
            with torch.no_grad(), self.precision_plugin.val_step_context():
                network(image, t, image)

    @override
    def on_validation_end(self) -> None:
        """Shard them again."""
        for network in self._sampled_networks():
            network.set_reshard_after_forward(True)
            for part in network.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def _sampled_networks(self) -> Iterator[Any]:
        module = cast(nn.Module, self.lightning_module)
        for network in module.modules():
            is_trained = any(parameter.requires_grad for parameter in network.parameters())
            if isinstance(network, KSRUNet) and not is_trained:
                yield network

    # ---- checkpoints hold whole tensors ----------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state, whole, on rank 0; the others only take part."""
        return whole_on_first_rank(super().lightning_module_state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state, whole, on rank 0; the others only take part."""
        return whole_on_first_rank(super().optimizer_state(optimizer))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its shards of the moments."""
        states = checkpoint["optimizer_states"]
        sharded = [shards_of_state(o, s) for o, s in zip(self.optimizers, states, strict=True)]
        super().load_optimizer_state_dict({"optimizer_states": sharded})


class ShardedNetwork(nn.Module):
    """A sharded network with DDP's interface: ``forward``, and ``no_sync`` for accumulation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the network's output, as a view.

        FSDP2 gathers weights for the backward when the gradient at *its* output is asked for; the
        terms' gradients at pred_x_0 are asked for one by one and need no weights.
        """
        output: Tensor = self.network(*inputs)
        return output.view_as(output)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients local."""
        network = cast(FSDPModule, self.network)
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)


def shard_unet(unet: KSRUNet, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard a U-Net in place."""
    if is_channels_last(unet):
        # FSDP2 takes contiguous weights only; from here on the pictures carry the format.
        unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        unet.conv_in.register_forward_pre_hook(_to_channels_last)
    for part in unet.modules():
        if isinstance(part, ResNetBlock):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def look_through_shards(critic: Critic) -> None:
    """Make a critic's ``encode`` gather the weights of its sharded trunk, as forward does.

    Registered under another name: forward calls ``encode`` too, and would reshard after it.
    """
    trunk: Any = critic.trunk
    trunk.encode_alone = trunk.encode
    register_fsdp_forward_method(trunk, "encode_alone")
    critic.encode = trunk.encode_alone


def is_channels_last(network: nn.Module) -> bool:
    """Return whether any convolution's weights are in channels_last."""
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in network.parameters()
        if weight.dim() == 4
    )


def _to_channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs)


def whole_on_first_rank(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with every sharded tensor whole and on the CPU; empty on the other ranks.

    One tensor at a time: no device ever holds the whole network for it.
    """
    whole = _map_tensors(state, _gather)
    return whole if dist.get_rank() == 0 else {}


def _gather(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def shards_of_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimiser's whole state with the moments of sharded parameters in shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        index: _map_tensors(values, lambda tensor, p=parameters[index]: _shard_like(tensor, p))
        for index, values in state["state"].items()
    }
    return {**state, "state": sharded}


def _shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    # Every rank has read the file: each cuts its own share out, nothing is sent.
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    return [_map_tensors(value, change) for value in tree] if isinstance(tree, list) else tree
