"""The training modules as train.py builds them, with their optimisers and without a Trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ksr_distill.models import KSRUNet
from ksr_distill.randomness import generator_for
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.distillation import DistillationModule
from ksr_distill.types import Batch

CONF = Path(__file__).parents[1] / "conf"

# As in most of a run: no critic warm-up, all timesteps, roll-outs at their final probability.
STEADY = [
    "loss.game.critic_warmup_updates=0",
    "loss.game.late_timesteps_updates=0",
    "loss.game.backward_simulation_ramp=[0,0]",
]


def composed(*overrides: str) -> dict[str, Any]:
    """Return train.yaml's config, resolved."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        needed = ["run_dir=none", "data.shards=none", "num_updates=1000", "name=none"]
        config = compose("train", [*needed, *overrides])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def write_random_teacher(
    folder: Path, model: dict[str, Any], device: torch.device | str = "cpu"
) -> Path:
    """Write a network of the config's size with random weights that do not vanish.

    Args:
        device: Where they are drawn: 413 M of them take a CPU half a minute.
    """
    torch.manual_seed(0)
    with torch.device(device):
        unet = KSRUNet(**model)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    unet.save_pretrained(folder / "sr")
    return folder


class BareOptimizer:
    """What the module uses of Lightning's wrapper of an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.step = optimizer.step
        self.zero_grad = optimizer.zero_grad


def build_module(config: dict[str, Any], device: torch.device) -> UpdateModule:
    """Return the config's module on the device, ready for training_step."""
    build = instantiate(config["module"], _partial_=True, _convert_="all")
    module: UpdateModule = build(record={"config": config})
    module.to(device).train()
    renew_optimizers(module)
    module.manual_backward = lambda loss, *_, **__: loss.backward()  # type: ignore[method-assign]
    return module


def renew_optimizers(module: UpdateModule) -> None:
    """Give the module new optimisers: their state follows the weights' memory format."""
    bare: list[Any] = [BareOptimizer(optimizer) for optimizer in module.configure_optimizers()]
    module.optimizers = lambda *_, **__: bare  # type: ignore[method-assign]


def random_batch(size: int, crop_px: int, device: torch.device, scale: int = 2) -> Batch:
    """Return smooth random pictures and their reductions."""
    generator = generator_for(0, device=device)
    small = torch.rand(size, 3, crop_px // 8, crop_px // 8, generator=generator, device=device)
    hires = torch.nn.functional.interpolate(small, (crop_px, crop_px), mode="bicubic") * 2 - 1
    return Batch(hires, torch.nn.functional.avg_pool2d(hires, scale))


@contextmanager
def precision_of_training(device: torch.device) -> Iterator[None]:
    """Set what trainer/auto.yaml sets (bf16 autocast, TF32, cuDNN autotuning); float32 on a CPU."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    on_cuda = device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_cuda else nullcontext():
        yield


def whole_update(module: UpdateModule, batch: Batch) -> None:
    """Make one update as training does."""
    module.training_step(batch, 0)


def critic_turn(module: DistillationModule, batch: Batch) -> None:
    """Run the critic's turn alone, as in its warm-up."""
    micro_batches = module.begin("critic's turn alone", module.prepare(batch))
    passes = [module.forward_pass(m, with_gradient=False) for m in micro_batches]
    module.end_update(module.critic_turn(micro_batches, passes))


def student_turn(module: DistillationModule, batch: Batch) -> None:
    """Run the student's turn alone, from the preparation on."""
    micro_batches = module.begin("student's turn alone", module.prepare(batch))
    module.end_update(module.student_turn(micro_batches, None))


def turns_of(module: UpdateModule) -> dict[str, Callable[[Any, Batch], None]]:
    """Return what is measured: turns and update of a distillation, or a teacher's update."""
    if isinstance(module, DistillationModule):
        return {"student turn": student_turn, "critic turn": critic_turn, "update": whole_update}
    return {"update": whole_update}
