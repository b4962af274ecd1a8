"""Several processes: one DistributedDataParallel wrapper per network.

The critic's turn reduces the critic's gradients and nothing else, without a search for unused
parameters: one wrapper around both networks reduced 1809 of 1809 elements where the critic had 101.
"""

import gc
import weakref
from datetime import timedelta
from typing import Any, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from typing_extensions import override


@runtime_checkable
class HasNetworks(Protocol):
    """What a LightningModule offers so that each of its networks can be reduced in its own turn."""

    def trainable_networks(self) -> dict[str, nn.Module]:
        """Return the networks that gradients flow into, by name."""
        ...

    @property
    def reduces_gradients(self) -> bool:
        """Whether the module averages gradients over the ranks itself; then DDP is not used."""
        ...

    def set_wrapped(self, name: str, wrapped: nn.Module) -> None:
        """Use this wrapper for gradient-carrying forwards; keep it outside the module tree."""
        ...

    def dummy_loss(self, name: str) -> Tensor:
        """Return a loss on made-up data, through this network's wrapper as in its turn."""
        ...


class PerNetworkDDP(DDPStrategy):
    """DDP with one wrapper around each trainable network; state_dict keys do not change."""

    def __init__(self, *, timeout_s: float = 900.0, **ddp_arguments: Any) -> None:
        """Make the strategy.

        Args:
            timeout_s: How long a collective waits for a lost or stuck rank before the run ends.
            ddp_arguments: For DDPStrategy and DistributedDataParallel.
        """
        # No network has buffers that change in a forward, so none is broadcast before each.
        defaults = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        self.timeout = timedelta(seconds=timeout_s)
        super().__init__(timeout=self.timeout, **{**defaults, **ddp_arguments})

    @override
    def configure_ddp(self) -> None:
        """Give every rank the weights of rank 0, and wrap each network."""
        module = self._networks_of_module()
        for tensor in cast(nn.Module, module).state_dict().values():
            dist.broadcast(tensor, src=0)
        if module.reduces_gradients:
            return
        for name, network in module.trainable_networks().items():
            module.set_wrapped(name, self.wrap_network(network))

    def wrap_network(self, network: nn.Module) -> nn.Module:
        """Return the wrapper that reduces a network's gradients in its backward."""
        return self._setup_model(network)

    @override
    def on_train_start(self) -> None:
        """Run one dummy backward through each wrapper.

        DDP lays out its buckets anew after the first backward. A resumed process would begin with
        the first layout again and sum in another order: on 3 and more ranks its first update
        differs in the last bits from the uninterrupted run's (measured). After the dummy backward
        both have the second layout. It runs eagerly: compiling for its small pictures would take
        as long as compiling for the training's.
        """
        module = self._networks_of_module()
        if module.reduces_gradients:
            return
        with torch.compiler.set_stance("force_eager"):
            for name, network in module.trainable_networks().items():
                with self.precision_plugin.train_step_context():
                    loss = module.dummy_loss(name)
                loss.backward()
                network.zero_grad(set_to_none=True)

    @override
    def teardown(self) -> None:
        """Take the wrappers off again."""
        if isinstance(self.lightning_module, HasNetworks):
            for name, network in self.lightning_module.trainable_networks().items():
                self.lightning_module.set_wrapped(name, network)
        super().teardown()

    def _networks_of_module(self) -> HasNetworks:
        if not isinstance(self.lightning_module, HasNetworks):
            raise ValueError(
                f"{type(self.lightning_module).__name__} has no trainable_networks, set_wrapped "
                "and dummy_loss, which PerNetworkDDP needs; use strategy=ddp for this module"
            )
        return self.lightning_module


def average_gradients(network: nn.Module) -> None:
    """Replace a network's gradients by their means over the ranks, all in one message.

    Where the backward is a CUDA graph, they are sent after it, not during it. One message
    for the 1.7 GB of the full size takes 5 ms between two H200 by NVLink and two passes over them;
    a message for each large gradient took 4 ms more, and messages inside the graph gained nothing
    (benchmarks/README.md).
    """
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    flat = [gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients]
    together = torch.cat(flat)
    if dist.get_backend() == "nccl":
        dist.all_reduce(together, op=dist.ReduceOp.AVG)
    else:  # gloo has no mean
        dist.all_reduce(together)
        together /= dist.get_world_size()
    torch._foreach_copy_(flat, together.split([piece.numel() for piece in flat]))


class HostAgreement:
    """The maximum of integers over all ranks, agreed on by the hosts without using the device."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Open a gloo group; every rank has to do so at the same point."""
        self._group: weakref.ref[dist.ProcessGroup] | None = None
        if dist.is_initialized():
            timeout = getattr(trainer.strategy, "timeout", None)
            group = dist.new_group(backend="gloo", timeout=timeout)
            self._group = weakref.ref(group)  # or its threads would outlive leave_groups

    def largest(self, *values: int) -> list[int]:
        """Return each value's maximum over the ranks."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group())
        return tensor.tolist()


def leave_groups() -> None:
    """Destroy all process groups and their threads, once every rank has finished its work.

    An interpreter that exits while gloo's threads run may abort. Do not call it after a rank was
    lost: it would wait for that rank.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # wrappers and hooks that refer to each other hold the group as well
