"""The smallest real training of student and critic, which the cluster tests kill and continue.

It keeps the contract: every draw is a function of (seed, stream, update, row), the
critic's turn over all micro-batches comes before the student's, one training_step is one update.
"""

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ksr_distill.randomness import Stream, generator_for
from ksr_distill.training.checkpoints import RunCheckpoint, last_good_checkpoint
from ksr_distill.training.strategy import PerNetworkDDP, average_gradients

SEED = 1234


class Positions:
    """A loader of `num_updates` items that begins at the module's update."""

    def __init__(self, module: "TwoNetworks", num_updates: int) -> None:
        self.module, self.num_updates = module, num_updates

    def __len__(self) -> int:
        return self.num_updates

    def __iter__(self) -> Iterator[int]:
        yield from range(self.module.update, self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def network(outputs: int, stream: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    layers.append(nn.Linear(64, outputs))
    generator = generator_for(SEED, Stream.INITIALISATION, stream)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return layers


class TwoNetworks(pl.LightningModule):
    def __init__(
        self,
        *,
        global_batch: int = 12,
        accumulate: int = 1,
        num_updates: int = 8,
        reduces_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student, self.critic = network(8, 0), network(1, 1)
        self.student_ema = network(8, 0).requires_grad_(False)
        self.global_batch, self.accumulate, self.num_updates = global_batch, accumulate, num_updates
        self.update = 0
        self.reduces_gradients = reduces_gradients
        self.at: Callable[[TwoNetworks, str], None] = lambda *_: None
        self.gradients: dict[str, Tensor] = {}
        self.logged: dict[str, float] = {}
        self.register_buffer("skipped_in_a_row", torch.zeros(2, dtype=torch.int64))
        object.__setattr__(self, "wrapped", {})

    def trainable_networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def set_wrapped(self, name: str, wrapped: nn.Module) -> None:
        self.wrapped[name] = wrapped

    def dummy_loss(self, name: str) -> Tensor:
        return self.wrapped[name](torch.ones(2, 8)).square().mean()

    def train_dataloader(self) -> Positions:
        return Positions(self, self.num_updates)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.student.parameters(), 1e-2),
            torch.optim.AdamW(self.critic.parameters(), 1e-2),
        ]

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        world = self.trainer.world_size
        each = self.global_batch // (world * self.accumulate)
        for i in range(self.accumulate):
            m = self.global_rank * self.accumulate + i
            rows = range(m * each, (m + 1) * each)
            draws = [generator_for(SEED, Stream.TURN, self.update, row) for row in rows]
            pairs = [torch.randn(2, 8, generator=generator) for generator in draws]
            yield torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def turn(self, name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        optimizer = self.optimizers()[["student", "critic"].index(name)]
        wrapped = self.wrapped.get(name, self.trainable_networks()[name])
        for i, (real, noise) in enumerate(self.micro_batches()):
            is_last = i == self.accumulate - 1
            free = getattr(wrapped, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if is_last else free():
                self.manual_backward(loss(real, noise) / self.accumulate)
        network = self.trainable_networks()[name]
        if self.reduces_gradients and dist.is_initialized():
            average_gradients(network)
        self.gradients[name] = torch.cat([p.grad.flatten() for p in network.parameters()])
        optimizer.step()
        optimizer.zero_grad()

    def training_step(self, position: int, batch_idx: int) -> None:
        assert position == self.update == batch_idx, (position, self.update, batch_idx)
        student = self.wrapped.get("student", self.student)
        critic = self.wrapped.get("critic", self.critic)
        self.at(self, "critic's turn")

        def critic_loss(real: Tensor, noise: Tensor) -> Tensor:
            with torch.no_grad():
                fake = self.student(noise)
            scores = critic(torch.cat([real, fake]))
            return F.relu(1 - scores[: len(real)]).mean() + F.relu(1 + scores[len(real) :]).mean()

        def student_loss(real: Tensor, noise: Tensor) -> Tensor:
            fake = student(noise)
            return F.mse_loss(fake, real) - self.critic(fake).mean()

        self.critic.requires_grad_(True)
        self.turn("critic", critic_loss)
        self.at(self, "student's turn")
        self.critic.requires_grad_(False)
        self.turn("student", student_loss)
        self.critic.requires_grad_(True)
        with torch.no_grad():
            pairs = zip(self.student_ema.parameters(), self.student.parameters(), strict=True)
            for ema, live in pairs:
                ema.lerp_(live, 0.1)
        self.update += 1
        self.at(self, "end of the update")

    def val_dataloader(self) -> list[int]:
        return [0]

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.log("val/psnr_y", float((self.update * 7) % 5), sync_dist=True, batch_size=1)
        self.at(self, "validation")

    def on_train_epoch_end(self) -> None:
        self.at(self, "end of the epoch")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["update"] = self.update

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.update = checkpoint["update"]


def digest(module: TwoNetworks, optimizers: list[torch.optim.Optimizer]) -> str:
    """Return a checksum of all weights, the EMA, both optimisers' moments and the counter."""
    sha = hashlib.sha256(str(module.update).encode())
    for name, value in module.state_dict().items():
        sha.update(name.encode() + value.numpy().tobytes())
    for optimizer in optimizers:
        for index, state in optimizer.state_dict()["state"].items():
            for key in sorted(state):
                sha.update(f"{index}.{key}".encode() + state[key].numpy().tobytes())
    return sha.hexdigest()


def checkpointing(folder: Path, **changes: Any) -> RunCheckpoint:
    settings: dict[str, Any] = {
        "every_updates": 100,
        "every_minutes": 60.0,
        "keep_last": 2,
        "keep_best": 1,
        "monitor": "val/psnr_y",
        "mode": "max",
        "background_above_mb": 100.0,
    }
    return RunCheckpoint(folder, **{**settings, **changes})


def train(
    folder: Path,
    *,
    module: TwoNetworks | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    timeout_s: float = 20.0,
    checkpoint: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> str:
    """Train, or continue: the same call does both. Returns the digest of the end."""
    module = module or TwoNetworks()
    saver = checkpointing(folder, **(checkpoint or {}))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "default_root_dir": folder,
    }
    if world > 1 and "strategy" not in (trainer or {}):
        arguments["strategy"] = PerNetworkDDP(
            timeout_s=timeout_s, process_group_backend="gloo", bucket_cap_mb=0.01
        )
    run = pl.Trainer(**{**arguments, **(trainer or {})}, callbacks=[*callbacks, saver])
    run.fit(module, ckpt_path=last_good_checkpoint(folder))
    return digest(module, run.optimizers)


def write_result(path: Path, **result: Any) -> None:
    path.write_text(json.dumps(result))


def die_at(update: int, place: str) -> Callable[[TwoNetworks, str], None]:
    """Return a hook that ends the process without a word, as SIGKILL by the kernel does."""

    def at(module: TwoNetworks, now: str) -> None:
        if (module.update, now) == (update, place):
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def sleeper(seconds: float, skew: float = 0.0) -> Callable[[TwoNetworks, str], None]:
    def at(module: TwoNetworks, place: str) -> None:
        if place == "student's turn":
            time.sleep(seconds + skew * module.global_rank)

    return at
