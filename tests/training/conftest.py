"""A tiny distillation without a Trainer: real networks and optimisers, noise for photos."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.modules import BareOptimizer
from ksr_distill.models import Critic, KSRUNet
from ksr_distill.training.distillation import DistillationModule
from ksr_distill.training.settings import CriticTerms, GameSettings, PlayerOptim, StudentTerms
from ksr_distill.types import Batch

TINY = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": (1, 1),
        "time_embedding_dim": 16, "num_groups": 4}  # fmt: skip


def adamw(**changes: Any) -> PlayerOptim:
    defaults = {"learning_rate": 1e-3, "betas": (0.0, 0.99), "weight_decay": 0.0,
                "warmup_updates": 0, "decay_share": 0.0, "clip_norm": 10.0}  # fmt: skip
    return PlayerOptim(**{**defaults, **changes})


def game(**changes: Any) -> GameSettings:
    defaults = {
        "critic_updates_per_student": 1, "critic_warmup_updates": 0, "late_timesteps_updates": 0,
        "backward_simulation_prob": 0.5, "backward_simulation_ramp": (0, 0),
        "critic_log_snr": (-2.0, 6.0), "critic_timesteps": (11, 456),
    }  # fmt: skip
    return GameSettings(**{**defaults, **changes})


def batch(seed: int = 0, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    hires = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    return Batch(hires, torch.nn.functional.avg_pool2d(hires, 2))


class StandaloneDistillation(DistillationModule):
    """The module with the optimisers that a Trainer would hold."""

    micro_batches_per_update = 1
    bare_optimizers: list[BareOptimizer] | None = None

    def optimizers(self) -> Any:
        if self.bare_optimizers is None:
            self.bare_optimizers = [BareOptimizer(o) for o in self.configure_optimizers()]
        return self.bare_optimizers

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()

    @property
    def accumulate(self) -> int:
        return self.micro_batches_per_update

    @property
    def global_rank(self) -> int:
        return 0


@pytest.fixture
def make_module() -> Callable[..., StandaloneDistillation]:
    def make(**changes: Any) -> StandaloneDistillation:
        torch.manual_seed(0)
        teacher = KSRUNet(**TINY, predict_residual=True)
        torch.nn.init.normal_(teacher.conv_out.weight, std=0.05)
        student = KSRUNet(**TINY, predict_residual=True)
        student.load_state_dict(teacher.state_dict())
        defaults = {
            "student": student,
            "critic": Critic(teacher, head_channels=8, normalise_features=True),
            "student_optim": adamw(), "critic_optim": adamw(), "timesteps": (979, 729, 479, 229),
            "game": game(),
            "critic_terms": CriticTerms(penalty="r1_head", penalty_weight=0.1, ar1_sigma=0.01,
                                        drift_weight=1e-3),
            "student_terms": StudentTerms(adversarial=1.0, l1=0.5, feature_matching=0.5,
                                          lowres_consistency=0.25, balance=True, balance_floor=0.0),
            "scale": 2, "seed": 1, "num_updates": 100, "ema_decay": 0.999,
            "compile_networks": False, "cuda_graphs": False, "record": {},
        }  # fmt: skip
        return StandaloneDistillation(**{**defaults, **changes}).train()

    return make
