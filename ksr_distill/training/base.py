"""What teacher and distillation share: seeded draws, optimiser steps, checkpoints, logging."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ksr_distill.randomness import Stream, generator_for
from ksr_distill.training.compiling import WAYS, compile_network
from ksr_distill.training.cuda_graphs import CudaGraphBackend, GraphRunner
from ksr_distill.training.ema import ema_decay, update_ema
from ksr_distill.training.settings import PlayerOptim, require
from ksr_distill.training.strategy import average_gradients
from ksr_distill.types import Batch

log = logging.getLogger(__name__)


class UpdateModule(LightningModule):
    """A LightningModule whose unit is the update: one training_step, one item of the loader.

    Every random draw is a function of (seed, stream, update, micro-batch), so the whole state of a
    run is its weights, averages, optimisers and a few integers.

    Args:
        seed: The run's seed.
        num_updates: Length of the run; a decaying learning rate reaches zero there.
        ema_decay: Final decay of the averaged network.
        compile_networks: What of the networks is compiled, see ``compiling.WAYS``; pays off after
            some hundred updates.
        cuda_graphs: Capture updates as CUDA graphs and replay them, see ``cuda_graphs``; no effect
            on a CPU.
        record: Stored in checkpoints for export, e.g. the resolved config. Plain types.
    """

    averaged: str
    """Name of the network that is averaged; its average is ``{averaged}_ema``."""
    scale: int
    skipped_updates: Tensor
    skipped_in_a_row: Tensor

    def __init__(
        self,
        *,
        seed: int,
        num_updates: int,
        ema_decay: float,
        compile_networks: bool | str,
        cuda_graphs: bool | str,
        record: dict[str, Any],
    ) -> None:
        allowed = "false, networks, blocks or norms"
        require(compile_networks in WAYS, "compile_networks", compile_networks, allowed)
        require(isinstance(cuda_graphs, bool), "cuda_graphs", cuda_graphs, "true or false")
        super().__init__()
        self.automatic_optimization = False
        self.seed = seed
        self.num_updates = num_updates
        self.ema_decay = ema_decay
        self.compile_networks = compile_networks
        self.cuda_graphs = bool(cuda_graphs)
        self.graphs = GraphRunner(None)
        self.record = {"seed": seed, **record}
        self.update = 0
        self.validated_update: int | None = None
        self.earlier_figures: dict[str, float] = {}
        self.network_updates: dict[str, int] = {}
        self.last_values: dict[str, Tensor] = {}
        self.logged: dict[str, float] = {}
        self.previews: list[dict[str, Tensor]] = []
        self._wrapped: dict[str, nn.Module] = {}
        self._optim: dict[str, PlayerOptim] = {}

    def add_network(self, name: str, network: nn.Module, optim: PlayerOptim) -> None:
        """Register a network that is trained, under its name."""
        self._optim[name] = optim
        self.set_wrapped(name, network)
        self.network_updates[name] = 0
        num = len(self._optim)
        self.register_buffer("skipped_updates", torch.zeros(num, dtype=torch.int64))
        self.register_buffer("skipped_in_a_row", torch.zeros(num, dtype=torch.int64))

    def trainable_networks(self) -> dict[str, nn.Module]:
        """Return the networks that gradients flow into, by name, in the order of their turns."""
        raise NotImplementedError

    def set_wrapped(self, name: str, wrapped: nn.Module) -> None:
        """Use this wrapper (DDP, compiled) for gradient-carrying forwards of a network."""
        if self.compile_networks:
            way = str(self.compile_networks) if name == self.averaged else "networks"
            wrapped = compile_network(wrapped, way)
        self._wrapped[name] = wrapped

    def wrapped(self, name: str) -> nn.Module:
        """Return the network as gradient-carrying forwards should call it."""
        return self._wrapped[name]

    def average_of(self, network: nn.Module) -> nn.Module:
        """Return a frozen copy, the start of the network's moving average."""
        return copy.deepcopy(network).requires_grad_(False).eval()

    @property
    def reduces_gradients(self) -> bool:
        """Whether ``step`` averages gradients over the ranks itself: CUDA graphs run no hooks."""
        return self.cuda_graphs

    def on_train_start(self) -> None:
        """Prepare to capture CUDA graphs.

        Raises:
            ValueError: If a replay would overwrite the gradients of earlier micro-batches.
        """
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(
                f"cuda_graphs=true with {self.accumulate} micro-batches in an update: a replayed "
                "backward overwrites the gradients of the one before; use "
                "data.micro_batch_size=null, or cuda_graphs=false"
            )
        self.make_graph_runner()

    def make_graph_runner(self) -> None:
        """Start capturing anew: weights may have moved in memory. On a CPU nothing is captured."""
        captures = self.cuda_graphs and self.device.type == "cuda"
        self.graphs = GraphRunner(CudaGraphBackend() if captures else None)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run neither compiled code nor CUDA graphs meanwhile."""
        with torch.compiler.set_stance("force_eager"), self.graphs.paused():
            yield

    @property
    def frozen_prefix(self) -> str | None:
        """Prefix of state_dict keys that never change and are not saved."""
        return None

    # ---- draws and micro-batches -----------------------------------------------------------------

    def shared_generator(self, stream: Stream) -> torch.Generator:
        """Return this update's generator for what all ranks and micro-batches must agree on."""
        return generator_for(self.seed, stream, self.update)

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, torch.Generator]]:
        """Yield this rank's micro-batches, each with its own generator on the device.

        Micro-batch m of the update is number rank·accumulate + i: the same global batch gives the
        same draws on any number of ranks.
        """
        accumulate = self.accumulate
        pieces = zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True)
        for i, piece in enumerate(pieces):
            micro_batch = self.global_rank * accumulate + i
            generator = generator_for(
                self.seed, Stream.TURN, self.update, micro_batch, device=self.device
            )
            yield Batch(*piece), generator

    @property
    def accumulate(self) -> int:
        """Micro-batches of one update on this rank."""
        return getattr(self.trainer.datamodule, "accumulate", 1) if self._trainer else 1

    def no_sync_but_last(self, name: str, index: int, count: int) -> Any:
        """Return a context in which gradients stay local until the last micro-batch."""
        wrapped = self.wrapped(name)
        if index < count - 1 and hasattr(wrapped, "no_sync"):
            return cast(DistributedDataParallel, wrapped).no_sync()
        return nullcontext()

    # ---- one optimiser step ----------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return one AdamW per network; fused, because that one can skip a step on the device."""
        return [
            torch.optim.AdamW(
                network.parameters(),
                lr=self._optim[name].learning_rate,
                betas=cast(tuple[float, float], tuple(self._optim[name].betas)),
                weight_decay=self._optim[name].weight_decay,
                fused=True,
            )
            for name, network in self.trainable_networks().items()
        ]

    def learning_rate(self, name: str) -> float:
        """Return a network's rate in its next update."""
        return self._optim[name].rate(self.network_updates[name], self.update / self.num_updates)

    def last_learning_rate(self, name: str) -> float:
        """Return the rate of a network's last update; 0 before its first."""
        optimizers = cast(list[Any], self.optimizers(use_pl_optimizer=False))
        index = list(self._optim).index(name)
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        return optimizer.param_groups[0]["lr"] if self.network_updates[name] else 0.0

    def step(self, name: str) -> Float[Tensor, ""]:
        """Clip and apply a network's gradients unless they are not finite; return their norm.

        A skipped update leaves weights, moments and average as they are. The host does not
        synchronise: the fused optimiser reads ``found_inf`` on the device.
        """
        index = list(self._optim).index(name)
        optim, network = self._optim[name], self.trainable_networks()[name]
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(name)
        if self.reduces_gradients and dist.is_initialized():
            average_gradients(network)
        norm = nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        found_inf = (~torch.isfinite(norm)).float()
        optimizer.optimizer.found_inf = found_inf
        optimizer.step()
        optimizer.zero_grad()
        self.network_updates[name] += 1
        self.skipped_updates[index] += found_inf.long()
        self.skipped_in_a_row[index] = (self.skipped_in_a_row[index] + 1) * found_inf.long()
        if name == self.averaged:
            decay = ema_decay(self.network_updates[name], self.ema_decay)
            update_ema(getattr(self, f"{name}_ema"), network, decay=decay, moved=1 - found_inf)
        return norm

    def end_update(self, values: dict[str, Tensor]) -> None:
        """Count the update; keep its values on the device, where callbacks may read them.

        Args:
            values: By name; losses are those of this rank's last micro-batch.
        """
        self.last_values = {name: value.detach() for name, value in values.items()}
        self.update += 1

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the state that training changes: everything but the frozen weights."""
        state = super().state_dict(*args, **kwargs)
        if self.frozen_prefix is None:
            return state
        return {k: v for k, v in state.items() if not k.startswith(self.frozen_prefix)}

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what ``state_dict`` returned, strictly.

        Raises:
            ValueError: If the checkpoint is of another model; names the first differing keys.
        """
        mine = self.state_dict()
        differing = sorted(
            (mine.keys() ^ state_dict.keys())
            | {k for k in mine.keys() & state_dict.keys() if mine[k].shape != state_dict[k].shape}
        )
        if differing:
            raise ValueError(
                f"the checkpoint is of another model: {len(differing)} keys differ in name or "
                f"shape ({', '.join(differing[:4])}, …); resume with the config that wrote it, or "
                "use another name= to start anew"
            )
        frozen = {k: v for k, v in super().state_dict().items() if k not in mine}
        return super().load_state_dict({**frozen, **state_dict}, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the record that export needs.

        An update is saved before it is validated: the metrics are those of an earlier one.
        """
        figures = {
            k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")
        }
        checkpoint["ksr"] = {
            **copy.deepcopy(self.record),
            "update": self.update,
            "network_updates": dict(self.network_updates),
            "validated_update": self.validated_update,
            "metrics": figures or self.earlier_figures,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters, and what the last validation found.

        Raises:
            ValueError: If the run was started as another: weights that fit by their shapes would go
                on in a network, or in a game, that they were not trained in.
        """
        saved = checkpoint["ksr"]
        before, now = identity(saved), identity(self.record)
        for key in (key for key in now if key in before):  # older checkpoints tell less
            if before[key] != now[key]:
                raise ValueError(
                    f"the checkpoint was made with {key}={before[key]!r}, this run has "
                    f"{now[key]!r}; give the same, or use another name= to start anew"
                )
        self.update = saved["update"]
        self.network_updates = dict(saved["network_updates"])
        self.validated_update = saved.get("validated_update")  # older checkpoints do not say
        self.earlier_figures = dict(saved.get("metrics", {}))
        log.info("resuming %s after update %d", self.record["kind"], self.update)

    def on_validation_epoch_end(self) -> None:
        """Note which update the validation's figures are of."""
        self.validated_update = self.update

    # ---- logging ---------------------------------------------------------------------------------

    def log_values(self, values: dict[str, Tensor | float]) -> None:
        """Write scalars to all loggers at this update. Call it rarely: it waits for the device."""
        if self.trainer.is_global_zero:
            numbers = {name: float(value) for name, value in values.items()}
            self.logged |= numbers
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, step=self.update)


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a run cannot be continued without, by the keys that set it."""
    keys = ("kind", "seed", "scale", "student_timesteps", "teacher_fingerprint",
            "critic.normalise_features", "terms of loss.student")  # fmt: skip
    layout = {f"model.{name}": value for name, value in record["model"].items()}
    layout.pop("model.dropout", None)  # moves no weight
    facts = {key: record[key] for key in keys if key in record} | layout
    return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
