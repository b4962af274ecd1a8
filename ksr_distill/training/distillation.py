"""Adversarial distillation: a few-step student against a critic on the teacher's features.

Notation (README, "The game"): c = lowres, x_0 = hires, G the student, a_t = √ᾱ_t, s_t = √(1 - ᾱ_t).
The critic is the paper's discriminator: Φ, the teacher's frozen downward half (the trunk), and
trained heads D on its features. Recipe: Kandinsky 3.1 Flash (arXiv:2312.03511, §5.1), adversarial
diffusion distillation (arXiv:2311.17042) with a Wasserstein loss.

Read ``training_step`` first, then ``prepare``, ``critic_turn`` and ``student_turn``.
``self.graphs.run(name, work)`` is ``work()``, or its replay as a CUDA graph (``cuda_graphs.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ksr_distill.diffusion import NoiseSchedule, noise_from, normal_noise, sample_few_steps
from ksr_distill.losses import (
    approximate_r1_penalty,
    critic_loss,
    drift_penalty,
    feature_matching_loss,
    lowres_consistency_loss,
    scores_and_r1,
    student_loss,
    weighted_l1,
    wgan_gp_head_penalty,
)
from ksr_distill.models import Critic, KSRUNet, enlarge, layout_of, scores_of_frozen_heads
from ksr_distill.randomness import Stream
from ksr_distill.training.balance import GradientBalance
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.compiling import IN_PLACE, compile_function
from ksr_distill.training.settings import CriticTerms, GameSettings, PlayerOptim, StudentTerms
from ksr_distill.training.validation import (
    Sampler,
    few_step_sampler,
    five_step_sampler,
    validate_batch,
)
from ksr_distill.types import Batch

LAST_TIMESTEP = 229
"""The released student's last timestep. L1 has its full weight here, and less at noisier ones."""


@dataclass
class MicroBatch:
    """What both turns need of one micro-batch; every random draw has been made."""

    x_0: Float[Tensor, "b 3 H W"]
    lowres: Float[Tensor, "b 3 H W"]  # enlarged
    x_t: Float[Tensor, "b 3 H W"]  # the student's input, at t
    t: Int[Tensor, " b"]
    timestep: int  # the value of all of t, known without reading the device
    critic_eps: Float[Tensor, "b 3 H W"]  # the noise through which the critic looks, at critic_t
    critic_t: Int[Tensor, " b"]
    penalty_draw: Tensor | None  # what the critic's penalty needs: ξ, or the mixing weights


@dataclass
class StudentInputs:
    """The student's inputs in one sampling step."""

    x_t: Float[Tensor, "b 3 H W"]
    t: Int[Tensor, " b"]
    lowres: Float[Tensor, "b 3 h w"]


@dataclass
class ForwardPass:
    """The student's estimate, and the trunk's features of it (fake) and of the original (real)."""

    pred_x_0: Float[Tensor, "b 3 H W"]
    fake: list[Tensor]
    real: list[Tensor]


@dataclass
class CriticOutputs:
    """The critic's losses by name, and its scores; detached."""

    losses: dict[str, Tensor]
    scores_real: list[Tensor]
    scores_fake: list[Tensor]


@dataclass
class UpdateOutputs:
    """The images and scores of an update's last micro-batch, for callbacks; detached."""

    x_0: Float[Tensor, "b 3 H W"]
    pred_x_0: Float[Tensor, "b 3 H W"]
    timestep: int
    scores_real: list[Tensor]
    scores_fake: list[Tensor]


class DistillationModule(UpdateModule):
    """Distils a teacher into a few-step student.

    Args:
        student: Starts from the teacher's weights; dropout 0.
        critic: Built on the frozen teacher.
        timesteps: The student's timesteps, falling, e.g. (979, 729, 479, 229).
    """

    averaged = "student"

    def __init__(  # noqa: PLR0913 - the groups of conf/
        self,
        *,
        student: KSRUNet,
        critic: Critic,
        student_optim: PlayerOptim,
        critic_optim: PlayerOptim,
        timesteps: Sequence[int],
        game: GameSettings,
        critic_terms: CriticTerms,
        student_terms: StudentTerms,
        scale: int,
        **run: Any,
    ) -> None:
        super().__init__(**run)
        self.student = student
        self.student_ema = self.average_of(student)
        self.critic = critic
        self.scores_of_frozen_heads = scores_of_frozen_heads
        self.scores_and_r1 = scores_and_r1
        self.feature_matching_loss = feature_matching_loss
        if self.compile_networks:
            self.compile_critic()
        self.schedule = NoiseSchedule("linear")
        self.timesteps = tuple(timesteps)
        self.game = game
        self.critic_terms = critic_terms
        self.student_terms = student_terms
        self.balance = GradientBalance(
            student_terms.weights(),
            enabled=student_terms.balance,
            floor=student_terms.balance_floor,
        )
        self.scale = scale
        self.last_outputs: UpdateOutputs | None = None
        self.add_network("critic", critic.heads, critic_optim)
        self.add_network("student", student, student_optim)
        self.record |= {"kind": "student", "model": layout_of(student), "scale": scale,
                        "student_timesteps": list(self.timesteps),
                        "critic.normalise_features": critic.normalise_features,
                        "terms of loss.student": list(self.balance.weights)}  # fmt: skip

    # ---- the algorithm ---------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 - Lightning's
        """Make one update: the critic's turn, then the student's if it is due."""
        micro_batches = self.prepare(batch)
        student_moves = self.is_student_turn
        # With one micro-batch both turns share the forward pass of student and trunk: neither of
        # them changes in the critic's turn. More graphs than one would not fit into memory, so with
        # several micro-batches the student's turn runs its own.
        shares_forward = student_moves and len(micro_batches) == 1
        name = "both turns" if shares_forward else "critic's turn"
        micro_batches = self.begin(name, micro_batches)
        passes = [self.forward_pass(m, with_gradient=shares_forward) for m in micro_batches]
        values = self.critic_turn(micro_batches, passes)
        if student_moves:
            values |= self.student_turn(micro_batches, passes if shares_forward else None)
        self.end_update(values)

    def prepare(self, batch: Batch) -> list[MicroBatch]:
        """Make every draw of the update: x_t at a timestep that all ranks share, critic_t, noise.

        Early in the run only the later half of the timesteps is drawn.
        """
        shared = self.shared_generator(Stream.STUDENT_TIMESTEP)
        is_early = self.student_updates < self.game.late_timesteps_updates
        first = len(self.timesteps) // 2 if is_early else 0
        index = int(torch.randint(first, len(self.timesteps), (), generator=shared))
        prob = self.game.simulation_prob(self.student_updates)
        simulates = bool(torch.rand((), generator=shared) < prob)
        return [
            self.prepare_micro_batch(part, generator, index=index, simulates=simulates)
            for part, generator in self.micro_batches(batch)
        ]

    @torch.no_grad()
    def prepare_micro_batch(
        self, batch: Batch, generator: torch.Generator, *, index: int, simulates: bool
    ) -> MicroBatch:
        """Noise the original, or with backward simulation the student's own previous estimate.

        At the first timestep x_t is pure noise either way, for that is where sampling starts.

        Args:
            index: Of the timestep among the student's.
            simulates: Whether x_t comes from a roll-out of the student (backward simulation).
        """
        x_0, lowres = batch[0], enlarge(batch[1], batch[0])  # here once, not in each network
        *earlier, timestep = self.timesteps[: index + 1]
        t = torch.full(x_0.shape[:1], timestep, device=x_0.device)
        start = x_0
        if simulates and earlier:
            start = sample_few_steps(
                self.roll_out_step,
                lowres,
                timesteps=earlier,
                schedule=self.schedule,
                draw_noise=noise_from(generator, x_0.shape, device=x_0.device),
            )
        eps = normal_noise(generator, x_0.shape, device=x_0.device)
        x_t = self.schedule.add_noise(start, eps, t) if earlier else eps
        critic_t = self.draw_critic_t(x_0, generator)
        critic_eps = normal_noise(generator, x_0.shape, device=x_0.device)
        penalty_draw = self.draw_for_penalty(x_0, generator)
        return MicroBatch(x_0, lowres, x_t, t, timestep, critic_eps, critic_t, penalty_draw)

    def roll_out_step(self, x_t: Tensor, t: Tensor, lowres: Tensor) -> Float[Tensor, "b 3 H W"]:
        """Return the student's estimate in a roll-out; the next call may overwrite it."""
        self.graphs.begin("roll-out")
        inputs = self.graphs.static(StudentInputs(x_t, t, lowres))
        return self.graphs.run(
            "roll-out", lambda: self.wrapped("student")(inputs.x_t, inputs.t, inputs.lowres)
        )

    def draw_critic_t(self, x_0: Tensor, generator: torch.Generator) -> Int[Tensor, " b"]:
        """Draw the critic's timesteps, uniformly in log-SNR.

        The range lies at little noise: lowres fixes the structure, so only texture is left to tell.
        """
        low, high = self.game.critic_log_snr
        u = torch.rand(x_0.shape[0], generator=generator, device=x_0.device)
        t = self.schedule.timestep_of_log_snr(low + (high - low) * u)
        return t.clamp(*self.game.critic_timesteps)

    def draw_for_penalty(self, x_0: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw what the critic's penalty needs, if anything."""
        if self.critic_terms.penalty == "ar1":
            return normal_noise(generator, x_0.shape, device=x_0.device)
        if self.critic_terms.penalty == "wgan_gp_head":
            shape = (x_0.shape[0], 1, 1, 1)
            return torch.rand(shape, generator=generator, device=x_0.device)
        return None

    def begin(self, name: str, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Begin a sequence of CUDA graphs; return the micro-batches where the graphs read them."""
        self.graphs.begin(name)
        return [self.graphs.static(m) for m in micro_batches]

    def forward_pass(self, m: MicroBatch, *, with_gradient: bool) -> ForwardPass:
        """Return the student's estimate, and the critic's features of it and of the original."""
        return self.graphs.run("forward", lambda: self._forward_pass(m, with_gradient))

    def _forward_pass(self, m: MicroBatch, with_gradient: bool) -> ForwardPass:
        with torch.set_grad_enabled(with_gradient):
            pred_x_0 = self.wrapped("student")(m.x_t, m.t, m.lowres).float()
            fake = self.critic_features(pred_x_0, m)
        with torch.no_grad():
            return ForwardPass(pred_x_0, fake, self.critic_features(m.x_0, m))

    def critic_features(self, image: Tensor, m: MicroBatch) -> list[Tensor]:
        """Return n_k(a·image + s·ε): what the heads read of an image, noised to critic_t."""
        x_t = self.schedule.add_noise(image, m.critic_eps, m.critic_t)
        return self.critic.features(x_t, m.critic_t, m.lowres)

    def critic_turn(
        self, micro_batches: Sequence[MicroBatch], passes: Sequence[ForwardPass]
    ) -> dict[str, Tensor]:
        """Step the heads down E[D(fake)] - E[D(real)] + γ·R + drift·E[D(real)²]."""
        share = 1 / len(micro_batches)
        for i, (m, forward) in enumerate(zip(micro_batches, passes, strict=True)):
            with self.no_sync_but_last("critic", i, len(micro_batches)):
                outputs = self.graphs.run(
                    "critic",
                    lambda m=m, forward=forward: self.critic_backward(m, forward, share=share),
                    trains=self.critic.heads,
                )
        self.last_outputs = UpdateOutputs(m.x_0, forward.pred_x_0.detach(), m.timestep,
                                          outputs.scores_real, outputs.scores_fake)  # fmt: skip
        return {**outputs.losses, "train/critic_gradient_norm": self.step("critic")}

    def critic_backward(
        self, m: MicroBatch, forward: ForwardPass, *, share: float
    ) -> CriticOutputs:
        """Add the gradient of the critic's loss, times this micro-batch's share, to the heads."""
        terms = self.critic_terms
        with self.in_float32():
            scores_fake = self.wrapped("critic")(self.head_inputs(forward.fake), m.critic_t)
        scores_real, penalty = self.scores_and_penalty(m, forward)
        gap = critic_loss(scores_real, scores_fake)
        drift = drift_penalty(scores_real)
        loss = gap + terms.penalty_weight * penalty + terms.drift_weight * drift
        with self.in_float32():
            self.manual_backward(loss * share)
        losses = {
            "train/loss_critic": loss,
            "train/wasserstein_gap": -gap,
            "train/gradient_penalty": penalty,
        }
        return CriticOutputs(
            {name: value.detach() for name, value in losses.items()},
            [score.detach() for score in scores_real],
            [score.detach() for score in scores_fake],
        )

    def scores_and_penalty(
        self, m: MicroBatch, forward: ForwardPass
    ) -> tuple[list[Tensor], Float[Tensor, ""]]:
        """Return the scores of the originals, and the penalty R without its weight γ."""
        heads, kind = self.critic.heads, self.critic_terms.penalty
        real = self.head_inputs(forward.real)
        if kind == "r1_head":
            with self.in_float32():
                scores, penalty = self.scores_and_r1(heads, real, m.critic_t)
            return scores, 0.5 * penalty
        scores = heads(real, m.critic_t)
        penalty = scores[0].new_zeros(())
        if kind == "wgan_gp_head":
            with self.in_float32():
                mixing = cast(Tensor, m.penalty_draw)
                penalty = wgan_gp_head_penalty(heads, real, forward.fake, m.critic_t, mixing)
        if kind == "ar1":
            xi = cast(Tensor, m.penalty_draw)
            with torch.no_grad():
                perturbed = self.critic_features(m.x_0 + self.critic_terms.ar1_sigma * xi, m)
            penalty = approximate_r1_penalty(scores, heads(self.head_inputs(perturbed), m.critic_t))
        return scores, penalty

    def head_inputs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the features detached from the trunk, in float32."""
        # On a CPU, torch 2.13 crashes in the backward of a channels_last GroupNorm whose input
        # needs no gradient.
        needs_grad = self.device.type == "cpu"
        return [n.detach().float().requires_grad_(needs_grad) for n in features]

    def in_float32(self) -> torch.autocast:
        """Return a context without autocast: it would run the double backward in bf16."""
        return torch.autocast(self.device.type, enabled=False)

    def student_turn(
        self, micro_batches: Sequence[MicroBatch], passes: Sequence[ForwardPass] | None
    ) -> dict[str, Tensor]:
        """Step the student down its terms, each balanced by the norm of its gradient at pred_x_0.

        The first turn of a run only measures these norms: its gradient is zero.

        Args:
            passes: Forward passes with gradient, if the critic's turn had them; None to run anew.
        """
        measures, share = [], 1 / len(micro_batches)
        for i, m in enumerate(micro_batches):
            with self.no_sync_but_last("student", i, len(micro_batches)):
                forward = passes[i] if passes else self.forward_pass(m, with_gradient=True)
                losses, measure = self.graphs.run(
                    "student",
                    lambda m=m, forward=forward: self.student_backward(m, forward, share=share),
                    trains=self.student,
                )
            measures.append(measure)
        terms = {f"train/{name}": loss for name, loss in losses.items()}
        return {**terms, **self.balance.end_turn(measures),
                "train/student_gradient_norm": self.step("student")}  # fmt: skip

    def student_backward(
        self, m: MicroBatch, forward: ForwardPass, *, share: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the balanced terms, times this micro-batch's share, to the student.

        Returns:
            The terms, and what the balance measured of them.
        """
        losses = self.student_losses(m, forward)
        push, measure = self.balance.push(losses, forward.pred_x_0)
        forward.pred_x_0.backward(push * share)
        return {name: loss.detach() for name, loss in losses.items()}, measure

    def student_losses(self, m: MicroBatch, forward: ForwardPass) -> dict[str, Tensor]:
        """Return the terms whose weight is not 0, by name."""
        weights, losses = self.student_terms, {}
        if weights.adversarial:
            scores = self.scores_of_frozen_heads(self.critic.heads, forward.fake, m.critic_t)
            losses["adversarial"] = student_loss(scores)
        if weights.l1:
            certainty = self.schedule.signal(m.t) / self.schedule.signal(m.t * 0 + LAST_TIMESTEP)
            losses["l1"] = weighted_l1(forward.pred_x_0, m.x_0, certainty)
        if weights.feature_matching:
            losses["feature_matching"] = self.feature_matching_loss(forward.fake, forward.real)
        if weights.lowres_consistency:
            losses["lowres_consistency"] = lowres_consistency_loss(
                forward.pred_x_0, m.x_0, scale=self.scale
            )
        return losses

    # ---- bookkeeping -----------------------------------------------------------------------------

    def compile_critic(self) -> None:
        """Compile the trunk, the feature normalisation, the heads and the feature losses."""
        if self.compile_networks in IN_PLACE:
            IN_PLACE[str(self.compile_networks)](self.critic.trunk)
        else:
            self.critic.encode = compile_function(self.critic.encode)
        self.critic.normalise = compile_function(self.critic.normalise)
        self.scores_of_frozen_heads = compile_function(scores_of_frozen_heads)
        self.scores_and_r1 = compile_function(scores_and_r1)
        self.feature_matching_loss = compile_function(feature_matching_loss)

    @property
    def is_student_turn(self) -> bool:
        """Whether the student moves in this update: in every n-th after the critic's warm-up."""
        since_warmup = self.update - self.game.critic_warmup_updates
        every = self.game.critic_updates_per_student
        return since_warmup >= 0 and (since_warmup + 1) % every == 0

    @property
    def student_updates(self) -> int:
        """How many updates the student has had."""
        return self.network_updates["student"]

    def trainable_networks(self) -> dict[str, nn.Module]:
        """Return critic and student, in the order of their turns."""
        return {"critic": self.critic.heads, "student": self.student}

    @property
    def frozen_prefix(self) -> str:
        """The trunk is the teacher's: it comes from the teacher's folder, not from checkpoints."""
        return "critic.trunk."

    def dummy_loss(self, name: str) -> Float[Tensor, ""]:
        """Return a loss on made-up data through the wrapper, for DDP's first bucket layout."""
        t = torch.zeros(2, dtype=torch.int64, device=self.device)
        image = torch.zeros(2, 3, *2 * [8 * self.student.stride], device=self.device)
        if name == "student":
            return self.wrapped("student")(image, t, image).float().square().mean()
        with torch.no_grad():
            features = self.critic.features(image, t, image)
        features = self.head_inputs(features)
        return torch.stack([s.mean() for s in self.wrapped("critic")(features, t)]).sum()

    def samplers(self) -> dict[str, Sampler]:
        """Return what validation compares: the student in its steps, and the teacher in five."""
        student = few_step_sampler(self.student_ema, self.schedule, self.timesteps)
        return {"student": student, "teacher_5": five_step_sampler(self.critic.trunk)}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the averaged student's samples against the originals."""
        validate_batch(self, batch, batch_idx, self.samplers())
