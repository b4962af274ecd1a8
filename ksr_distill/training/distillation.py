"""The game: a student learns to fool a critic that sees with the teacher's eyes.

Notation (README, "The game"): c = lowres, x_0 = hires, G the student, a_t = √ᾱ_t, s_t = √(1 - ᾱ_t).
The critic is the paper's discriminator: Φ, the teacher's frozen downward half, and trained heads D.
Recipe: Kandinsky 3.1 Flash (arXiv:2312.03511, §5.1), adversarial diffusion distillation
(arXiv:2311.17042) with a Wasserstein loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ksr_distill.diffusion import NoiseSchedule, noise_from, sample_few_steps
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
from ksr_distill.models import Critic, KSRUNet, enlarge, judge, layout_of
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
"""The released student's last timestep: L1 counts fully there, less where more was noise."""


@dataclass
class Round:
    """One micro-batch on the table: what the student is given, and how the critic will look."""

    x_0: Float[Tensor, "b 3 H W"]
    lowres: Float[Tensor, "b 3 H W"]  # enlarged
    x_t: Float[Tensor, "b 3 H W"]
    t: Int[Tensor, " b"]
    timestep: int  # all of t, on the host: nobody waits for the device
    critic_eps: Float[Tensor, "b 3 H W"]
    critic_t: Int[Tensor, " b"]
    penalty_draw: Tensor | None  # of the critic's penalty: ξ, or where it mixes


@dataclass
class Sight:
    """What the student is given in one step of sampling."""

    x_t: Float[Tensor, "b 3 H W"]
    t: Int[Tensor, " b"]
    lowres: Float[Tensor, "b 3 H W"]


@dataclass
class Play:
    """The student's estimate, and what the critic's trunk sees in it and in the original."""

    pred_x_0: Float[Tensor, "b 3 H W"]
    fake: list[Tensor]
    real: list[Tensor]


@dataclass
class Verdict:
    """The critic's losses by name, and its scores; holds no graph."""

    losses: dict[str, Tensor]
    scores_real: list[Tensor]
    scores_fake: list[Tensor]


@dataclass
class Table:
    """What lies open after an update, for whoever watches; holds no graph."""

    x_0: Float[Tensor, "b 3 H W"]
    pred_x_0: Float[Tensor, "b 3 H W"]
    timestep: int
    scores_real: list[Tensor]
    scores_fake: list[Tensor]


class DistillationModule(UpdateModule):
    """Distil a teacher into a student of few steps.

    Args:
        student: Starts from the teacher's weights; dropout 0.
        critic: Around the frozen teacher.
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
        self.judge, self.scores_and_r1 = judge, scores_and_r1
        self.feature_matching_loss = feature_matching_loss
        if self.compile_networks:
            self.compile_looking()
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
        self.table: Table | None = None
        self.add_network("critic", critic.heads, critic_optim)
        self.add_network("student", student, student_optim)
        self.record |= {"kind": "student", "model": layout_of(student), "scale": scale,
                        "student_timesteps": list(self.timesteps)}  # fmt: skip

    # ---- the algorithm ---------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 - Lightning's
        """Play one update: deal, the critic's turn, then (unless it waits) the student's."""
        rounds = self.deal(batch)
        student_moves = self.is_student_turn
        # With one micro-batch both turns share the student's and the trunk's forward pass: neither
        # changes between them. With more, the graphs would not fit, and the student plays again.
        shares_graph = student_moves and len(rounds) == 1
        rounds = self.begin("both turns" if shares_graph else "critic's turn", rounds)
        plays = [self.play(r, with_gradient=shares_graph) for r in rounds]
        values = self.critic_turn(rounds, plays)
        if student_moves:
            values |= self.student_turn(rounds, plays if shares_graph else None)
        self.end_update(values)

    def deal(self, batch: Batch) -> list[Round]:
        """Draw what both turns need: x_t at a t that all ranks share, and the critic's t and ε."""
        shared = self.shared_generator(Stream.STUDENT_TIMESTEP)
        is_early = self.student_updates < self.game.late_timesteps_updates
        first = len(self.timesteps) // 2 if is_early else 0
        index = int(torch.randint(first, len(self.timesteps), (), generator=shared))
        prob = self.game.simulation_prob(self.student_updates)
        simulates = bool(torch.rand((), generator=shared) < prob)
        how = {"index": index, "simulates": simulates}
        return [self.deal_round(*micro_batch, **how) for micro_batch in self.micro_batches(batch)]

    @torch.no_grad()
    def deal_round(
        self, batch: Batch, generator: torch.Generator, *, index: int, simulates: bool
    ) -> Round:
        """Noise the original, or (backward simulation) the student's own estimate one step before.

        The first timestep is pure noise either way: that is where sampling starts.
        """
        x_0, lowres = batch[0], enlarge(batch[1], batch[0])  # once: networks find it large enough
        draw_noise = noise_from(generator, x_0.shape, device=x_0.device)
        *earlier, timestep = self.timesteps[: index + 1]
        t = torch.full(x_0.shape[:1], timestep, device=x_0.device)
        start = x_0
        if simulates and earlier:
            start = sample_few_steps(self.estimate, lowres, timesteps=earlier,
                                     schedule=self.schedule, draw_noise=draw_noise)  # fmt: skip
        eps = draw_noise(0)
        x_t = self.schedule.add_noise(start, eps, t) if earlier else eps
        critic_t = self.draw_critic_t(x_0, generator)
        critic_eps, penalty_draw = draw_noise(0), self.draw_for_penalty(x_0, generator)
        return Round(x_0, lowres, x_t, t, timestep, critic_eps, critic_t, penalty_draw)

    def estimate(self, x_t: Tensor, t: Tensor, lowres: Tensor) -> Float[Tensor, "b 3 H W"]:
        """Return the student's estimate in a roll-out; good until the next one is asked for."""
        self.recorder.begin("estimate")
        sight = self.recorder.hold(Sight(x_t, t, lowres))
        return self.recorder.play(
            "estimate", lambda: self.wrapped("student")(sight.x_t, sight.t, sight.lowres)
        )

    def draw_critic_t(self, x_0: Tensor, generator: torch.Generator) -> Int[Tensor, " b"]:
        """Draw the timesteps at which the critic looks: log-SNR uniform, towards little noise.

        The structure of a super-resolved picture comes from c, so what is left to judge is texture.
        """
        low, high = self.game.critic_log_snr
        u = torch.rand(x_0.shape[0], generator=generator, device=x_0.device)
        t = self.schedule.timestep_of_log_snr(low + (high - low) * u)
        return t.clamp(*self.game.critic_timesteps)

    def draw_for_penalty(self, x_0: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw what the critic's penalty needs, if anything."""
        if self.critic_terms.penalty == "ar1":
            return noise_from(generator, x_0.shape, device=x_0.device)(0)
        if self.critic_terms.penalty == "wgan_gp_head":
            shape = (x_0.shape[0], 1, 1, 1)
            return torch.rand(shape, generator=generator, device=x_0.device)
        return None

    def begin(self, turns: str, rounds: Sequence[Round]) -> list[Round]:
        """Begin what is recorded as one; return the rounds where it reads them."""
        self.recorder.begin(turns)
        return [self.recorder.hold(r) for r in rounds]

    def play(self, r: Round, *, with_gradient: bool) -> Play:
        """Let the student estimate, and the trunk look at the estimate and at the original."""
        return self.recorder.play("play", lambda: self._play(r, with_gradient=with_gradient))

    def _play(self, r: Round, *, with_gradient: bool) -> Play:
        with torch.set_grad_enabled(with_gradient):
            pred_x_0 = self.wrapped("student")(r.x_t, r.t, r.lowres).float()
            fake = self.look(pred_x_0, r)
        with torch.no_grad():
            return Play(pred_x_0, fake, self.look(r.x_0, r))

    def look(self, image: Tensor, r: Round) -> list[Tensor]:
        """Return n_k(a·image + s·ε), what the heads read of an image at this round's t and ε."""
        x_t = self.schedule.add_noise(image, r.critic_eps, r.critic_t)
        return self.critic.features(x_t, r.critic_t, r.lowres)

    def critic_turn(self, rounds: Sequence[Round], plays: Sequence[Play]) -> dict[str, Tensor]:
        """Teach the heads: E[D(f)] - E[D(r)] + γ·R + drift·E[D(r)²]; step the critic."""
        for i, (r, play) in enumerate(zip(rounds, plays, strict=True)):
            with self.no_sync_but_last("critic", i, len(rounds)):
                verdict = self.recorder.play(
                    "critic",
                    lambda r=r, play=play: self.critic_gradient(r, play, share=1 / len(rounds)),
                    trains=self.critic.heads,
                )
        self.table = Table(r.x_0, play.pred_x_0.detach(), r.timestep,
                           verdict.scores_real, verdict.scores_fake)  # fmt: skip
        return {**verdict.losses, "train/critic_gradient_norm": self.step("critic")}

    def critic_gradient(self, r: Round, play: Play, *, share: float) -> Verdict:
        """Add the gradient of the critic's loss, times this micro-batch's share, to the heads."""
        terms = self.critic_terms
        with self.in_float32():
            scores_fake = self.wrapped("critic")(self.heads_inputs(play.fake), r.critic_t)
        scores_real, penalty = self.scores_and_penalty(r, play)
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
        return Verdict(
            {name: value.detach() for name, value in losses.items()},
            [score.detach() for score in scores_real],
            [score.detach() for score in scores_fake],
        )

    def scores_and_penalty(self, r: Round, play: Play) -> tuple[list[Tensor], Float[Tensor, ""]]:
        """Return the scores of the originals, and R without its weight γ."""
        heads, kind = self.critic.heads, self.critic_terms.penalty
        real = self.heads_inputs(play.real)
        if kind == "r1_head":
            with self.in_float32():
                scores, penalty = self.scores_and_r1(heads, real, r.critic_t)
            return scores, 0.5 * penalty
        scores = heads(real, r.critic_t)
        penalty = scores[0].new_zeros(())
        if kind == "wgan_gp_head":
            with self.in_float32():
                mixing = cast(Tensor, r.penalty_draw)
                penalty = wgan_gp_head_penalty(heads, real, play.fake, r.critic_t, mixing)
        if kind == "ar1":
            xi = cast(Tensor, r.penalty_draw)
            with torch.no_grad():
                perturbed = self.look(r.x_0 + self.critic_terms.ar1_sigma * xi, r)
            penalty = approximate_r1_penalty(
                scores, heads(self.heads_inputs(perturbed), r.critic_t)
            )
        return scores, penalty

    def heads_inputs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return features that the heads learn from, without a way back to the trunk."""
        # On a CPU torch 2.13's channels_last GroupNorm crashes in a backward that does not reach
        # its input.
        asks = self.device.type == "cpu"
        return [n.detach().float().requires_grad_(asks) for n in features]

    def in_float32(self) -> torch.autocast:
        """Return a context without autocast: double backward would call convolutions in bf16."""
        return torch.autocast(self.device.type, enabled=False)

    def student_turn(
        self, rounds: Sequence[Round], plays: Sequence[Play] | None
    ) -> dict[str, Tensor]:
        """Teach the student: each term's gradient at pred_x_0, balanced, one backward; step.

        The very first turn only takes the terms' measure: its push is zero.
        """
        measures = []
        for i, r in enumerate(rounds):
            with self.no_sync_but_last("student", i, len(rounds)):
                play = plays[i] if plays is not None else self.play(r, with_gradient=True)
                losses, measure = self.recorder.play(
                    "student",
                    lambda r=r, play=play: self.student_gradient(r, play, share=1 / len(rounds)),
                    trains=self.student,
                )
            measures.append(measure)
        terms = {f"train/{name}": loss for name, loss in losses.items()}
        return {**terms, **self.balance.end_turn(measures),
                "train/student_gradient_norm": self.step("student")}  # fmt: skip

    def student_gradient(
        self, r: Round, play: Play, *, share: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the balanced terms' gradient, times this micro-batch's share, to the student.

        Returns:
            The terms, and what the balance measured of them.
        """
        losses = self.student_losses(r, play)
        push, measure = self.balance.push(losses, play.pred_x_0)
        play.pred_x_0.backward(push * share)
        return {name: loss.detach() for name, loss in losses.items()}, measure

    def student_losses(self, r: Round, play: Play) -> dict[str, Tensor]:
        """Return the terms whose weight is not 0, by name."""
        weights, losses = self.student_terms, {}
        if weights.adversarial:
            losses["adversarial"] = student_loss(
                self.judge(self.critic.heads, play.fake, r.critic_t)
            )
        if weights.l1:
            certainty = self.schedule.signal(r.t) / self.schedule.signal(r.t * 0 + LAST_TIMESTEP)
            losses["l1"] = weighted_l1(play.pred_x_0, r.x_0, certainty)
        if weights.feature_matching:
            losses["feature_matching"] = self.feature_matching_loss(play.fake, play.real)
        if weights.lowres_consistency:
            losses["lowres_consistency"] = lowres_consistency_loss(
                play.pred_x_0, r.x_0, scale=self.scale
            )
        return losses

    # ---- bookkeeping -----------------------------------------------------------------------------

    def compile_looking(self) -> None:
        """Compile what looks at pictures: trunk, normalisation, heads and losses of features."""
        if self.compile_networks in IN_PLACE:
            IN_PLACE[str(self.compile_networks)](self.critic.trunk)
        else:
            self.critic.encode = compile_function(self.critic.encode)
        self.critic.normalise = compile_function(self.critic.normalise)
        self.judge, self.scores_and_r1 = compile_function(judge), compile_function(scores_and_r1)
        self.feature_matching_loss = compile_function(feature_matching_loss)

    @property
    def is_student_turn(self) -> bool:
        """Whether the student moves in this update: every n-th after the critic's warm-up."""
        since_warmup = self.update - self.game.critic_warmup_updates
        every = self.game.critic_updates_per_student
        return since_warmup >= 0 and (since_warmup + 1) % every == 0

    @property
    def student_updates(self) -> int:
        """How often the student has moved."""
        return self.network_updates["student"]

    @property
    def critic_updates(self) -> int:
        """How often the critic has moved."""
        return self.network_updates["critic"]

    def trainable_networks(self) -> dict[str, nn.Module]:
        """Return the players in the order of their turns."""
        return {"critic": self.critic.heads, "student": self.student}

    @property
    def frozen_prefix(self) -> str:
        """The teacher comes from its folder, not from checkpoints."""
        return "critic.trunk."

    def rehearsal_loss(self, name: str) -> Float[Tensor, ""]:
        """Return a loss on made-up data through the wrapper, for DDP's first bucket layout."""
        t = torch.zeros(2, dtype=torch.int64, device=self.device)
        image = torch.zeros(2, 3, *2 * [8 * self.student.stride], device=self.device)
        if name == "student":
            return self.wrapped("student")(image, t, image).float().square().mean()
        with torch.no_grad():
            features = self.critic.features(image, t, image)
        features = self.heads_inputs(features)
        return torch.stack([s.mean() for s in self.wrapped("critic")(features, t)]).sum()

    def samplers(self) -> dict[str, Sampler]:
        """Return what validation compares: the student in its steps, and the teacher in five."""
        student = few_step_sampler(self.student_ema, self.schedule, self.timesteps)
        return {"student": student, "teacher_5": five_step_sampler(self.critic.trunk)}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the averaged student's samples against the originals."""
        validate_batch(self, batch, batch_idx, self.samplers())
