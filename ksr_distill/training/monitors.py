"""Callbacks that log the health of the game and write validation previews."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ksr_distill.evaluation.metrics import (
    checkerboard_peaks,
    lowres_consistency_psnr,
    share_out_of_range,
    top_octave_power_ratio,
)
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.distillation import DistillationModule, UpdateOutputs
from ksr_distill.training.validation import save_previews

log = logging.getLogger(__name__)

MAX_AUC_SCORES = 4096


def auc(real: Float[Tensor, " n"], fake: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return how often a real score exceeds a fake one; ties count half. 0.5: the critic guesses.

    Mann–Whitney's U over n·m, by sorting: stays on the device.
    """
    ordered = fake.sort().values
    real = real.contiguous()
    below = torch.searchsorted(ordered, real, right=False)
    up_to = torch.searchsorted(ordered, real, right=True)
    return (below + up_to).double().mean() / (2 * len(fake))


def score_health(real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return two AUCs per head: over all pairs of places, and over pairs of the same place.

    Places differ more among themselves than real from fake, so only the paired AUC, whose pairs
    share content and noise, shows a small difference (docs/experiments.md); .6–.9 is healthy.
    """
    values = {}
    for k, pair in enumerate(zip(real, fake, strict=True)):
        a, b = (s.flatten()[:: max(1, s.numel() // MAX_AUC_SCORES)] for s in pair)
        values[f"health/auc_head_{k}"] = auc(a, b)
        values[f"health/paired_auc_head_{k}"] = (a > b).double().mean() + 0.5 * (
            a == b
        ).double().mean()
    return values


def picture_health(outputs: UpdateOutputs, scale: int) -> dict[str, Tensor]:
    """Return colour, sharpness, checkerboard and range metrics of the student's last batch."""
    image, hires = outputs.pred_x_0, outputs.x_0
    return {
        "health/lowres_consistency_psnr": lowres_consistency_psnr(image, hires, scale=scale).mean(),
        "health/top_octave_power_ratio": top_octave_power_ratio(image, hires).mean(),
        "health/checkerboard_peak": checkerboard_peaks(image, hires).amax(dim=1).mean(),
        "health/share_out_of_range": share_out_of_range(image).mean(),
        "health/mean_drift": (image.mean((0, 2, 3)) - hires.mean((0, 2, 3))).abs().max(),
        "health/std_drift": (image.std((0, 2, 3)) - hires.std((0, 2, 3))).abs().max(),
    }


class HealthMonitor(Callback):
    """Logs losses, and the game's health, every N updates.

    Args:
        every_updates: Only at these updates the host waits for the device.
    """

    def __init__(self, *, every_updates: int) -> None:
        self.every_updates = every_updates

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: UpdateModule, *_: Any) -> None:  # noqa: ARG002
        """Log losses, gradient norms, rates and skipped updates; for a distillation, its health."""
        if pl_module.update % self.every_updates:
            return
        values: dict[str, Tensor | float] = dict(pl_module.last_values)
        for i, name in enumerate(pl_module.trainable_networks()):
            values[f"train/{name}_updates"] = float(pl_module.network_updates[name])
            values[f"train/{name}_learning_rate"] = pl_module.last_learning_rate(name)
            values[f"health/{name}_skipped_updates"] = pl_module.skipped_updates[i]
        if isinstance(pl_module, DistillationModule) and pl_module.last_outputs is not None:
            outputs = pl_module.last_outputs
            values |= score_health(outputs.scores_real, outputs.scores_fake)
            values |= picture_health(outputs, pl_module.scale)
            values["health/timestep"] = float(outputs.timestep)
        pl_module.log_values(values)


class Previews(Callback):
    """Logs the validation metrics and writes pictures: ``previews/update_000500.png``.

    Args:
        folder: The run's folder.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder) / "previews"

    def on_validation_start(self, trainer: Trainer, pl_module: UpdateModule) -> None:  # noqa: ARG002
        """Forget the last validation's pictures."""
        pl_module.previews.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: UpdateModule) -> None:
        """Write the sheet and log the metrics, on the first rank."""
        if trainer.sanity_checking:
            return
        metrics: dict[str, Tensor | float] = {
            k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")
        }
        pl_module.log_values(metrics)
        if trainer.is_global_zero and pl_module.previews:
            self._write(trainer, pl_module)
        pl_module.previews.clear()

    def _write(self, trainer: Trainer, pl_module: UpdateModule) -> None:
        path = self.folder / f"update_{pl_module.update:06d}.png"
        try:
            save_previews(pl_module.previews, path)
        except OSError as error:  # a full disk: the run is worth more than its pictures
            log.warning("%s was not written (%s); training goes on: free space", path, error)
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("previews", [str(path)], step=pl_module.update)
