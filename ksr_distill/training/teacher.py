"""Teacher training: predict the clean image at any timestep."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ksr_distill.diffusion import NoiseSchedule, student_timesteps
from ksr_distill.models import KSRUNet, enlarge, layout_of
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.settings import PlayerOptim, require
from ksr_distill.training.validation import (
    Sampler,
    few_step_sampler,
    five_step_sampler,
    validate_batch,
)
from ksr_distill.types import Batch

DETAIL_LOG_SNR = (3.0, 9.0)
"""The log-SNR at which the detail that a lowres image lacks becomes visible through the noise.

Measured with a critic (docs/experiments.md, "where the critic can see"). It is t < 65, one draw in
fifteen if t is uniform.
"""


@dataclass
class MicroBatch:
    """The originals of one micro-batch, and what the teacher is given."""

    x_0: Float[Tensor, "b 3 H W"]
    lowres: Float[Tensor, "b 3 H W"]  # enlarged
    x_t: Float[Tensor, "b 3 H W"]
    t: Int[Tensor, " b"]


class TeacherModule(UpdateModule):
    """x_0-prediction on the released linear schedule (DDPM, arXiv:2006.11239, alg. 1).

    Args:
        detail_share: Share of draws with log-SNR uniform in ``DETAIL_LOG_SNR``; for the others t is
            uniform.
        unet: The network, initialised.
        scale: Upscaling factor of the degradation; written into exports.
        distance: ``l2`` gives the posterior mean that many-step sampling needs; ``l1`` is sharper
            in one step.
    """

    averaged = "teacher"

    def __init__(
        self,
        *,
        unet: KSRUNet,
        optim: PlayerOptim,
        scale: int,
        distance: Literal["l1", "l2"],
        detail_share: float | int,
        **run: Any,
    ) -> None:
        require(distance in ("l1", "l2"), "loss.distance", distance, "l1 or l2")
        super().__init__(**run)
        self.teacher = unet
        self.teacher_ema = self.average_of(unet)
        self.schedule = NoiseSchedule("linear")
        self.scale = scale
        self.distance = distance
        self.detail_share = detail_share
        self.add_network("teacher", unet, optim)
        self.record |= {"kind": "teacher", "model": layout_of(unet), "scale": scale}

    def trainable_networks(self) -> dict[str, nn.Module]:
        """Return the one network."""
        return {"teacher": self.teacher}

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 - Lightning's
        """Make one update: noise the originals, estimate them, and step."""
        micro_batches = [self.prepare(*part) for part in self.micro_batches(batch)]
        share = 1 / len(micro_batches)
        self.graphs.begin("update")
        for i, prepared in enumerate(micro_batches):
            m = self.graphs.static(prepared)
            with self.no_sync_but_last("teacher", i, len(micro_batches)):
                loss = self.graphs.run(
                    "teacher",
                    lambda m=m: self.teacher_backward(m, share=share),
                    trains=self.teacher,
                )
        gradient_norm = self.step("teacher")
        self.end_update({"train/loss": loss, "train/gradient_norm": gradient_norm})

    def prepare(self, batch: Batch, generator: torch.Generator) -> MicroBatch:
        """Noise the originals, each to a timestep of its own."""
        x_0, lowres = batch[0], enlarge(batch[1], batch[0])  # one input size for every scale
        t = self.draw_t(x_0, generator)
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        return MicroBatch(x_0, lowres, self.schedule.add_noise(x_0, eps, t), t)

    def teacher_backward(self, m: MicroBatch, *, share: float) -> Float[Tensor, ""]:
        """Add the loss's gradient, times this micro-batch's share; return pred_x_0's distance."""
        pred_x_0 = self.wrapped("teacher")(m.x_t, m.t, m.lowres)
        distance = F.mse_loss if self.distance == "l2" else F.l1_loss
        loss = distance(pred_x_0.float(), m.x_0)
        self.manual_backward(loss * share)
        return loss.detach()

    def draw_t(
        self, x_0: Float[Tensor, "b 3 H W"], generator: torch.Generator
    ) -> Int[Tensor, " b"]:
        """Draw a timestep for each image, see ``detail_share``."""
        shape, device = x_0.shape[:1], x_0.device
        num_timesteps = self.schedule.num_train_timesteps
        t = torch.randint(num_timesteps, shape, generator=generator, device=device)
        if self.detail_share == 0:
            return t
        u, place = torch.rand((2, *shape), generator=generator, device=device)
        low, high = DETAIL_LOG_SNR
        detail_t = self.schedule.timestep_of_log_snr(low + (high - low) * place)
        return torch.where(u < self.detail_share, detail_t, t)

    def dummy_loss(self, name: str) -> Float[Tensor, ""]:
        """Return a loss on made-up data through the wrapper, for DDP's first bucket layout."""
        x_t = torch.zeros(1, 3, *2 * [8 * self.teacher.stride], device=self.device)
        t = torch.zeros(1, dtype=torch.int64, device=self.device)
        return self.wrapped(name)(x_t, t, x_t).float().square().mean()

    def samplers(self) -> dict[str, Sampler]:
        """Return what validation compares: the one-step estimate and the five-step sample."""
        one_step = few_step_sampler(self.teacher_ema, self.schedule, student_timesteps(1))
        return {"teacher_1": one_step, "teacher_5": five_step_sampler(self.teacher_ema)}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the average's samples against the originals."""
        validate_batch(self, batch, batch_idx, self.samplers())
