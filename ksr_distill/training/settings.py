"""Typed and range-checked settings of the groups loss and optim; defaults are in conf/ alone."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from ksr_distill.diffusion import NoiseSchedule

Penalty = Literal["r1_head", "wgan_gp_head", "ar1", "none"]


def require(allowed: bool, key: str, value: object, rule: str) -> None:
    """Raise a ValueError that names the key, the value and what is allowed."""
    if not allowed:
        raise ValueError(f"{key}={value!r} is not allowed; use {rule}")


def check_types(settings: object, prefix: str) -> None:
    """Refuse a value of another type: to YAML, ``1e-4x`` is a text."""
    allowed = {float: (int, float), int: (int,), bool: (bool,), Penalty: (str,)}
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        kinds = allowed.get(field.type)
        if kinds is None:
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            require(is_list, f"{prefix}.{field.name}", value, "a list of numbers")
            continue
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        names = " or ".join(kind.__name__ for kind in kinds)
        require(fits, f"{prefix}.{field.name}", value, f"a value of type {names}")


@dataclass(frozen=True, kw_only=True)
class PlayerOptim:
    """AdamW for one network.

    Attributes:
        warmup_updates: The rate rises linearly over this many updates of this network.
        decay_share: The rate falls linearly to zero over this last share of the run; 0: constant.
        clip_norm: Largest gradient norm; larger gradients are scaled down to it.
    """

    learning_rate: float
    betas: Sequence[float]
    weight_decay: float
    warmup_updates: int
    decay_share: float
    clip_norm: float

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "optim.*")
        rate = self.learning_rate
        require(0 < rate < 1, "optim.*.learning_rate", rate, "a number between 0 and 1")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(good, "optim.*.betas", list(self.betas), "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "optim.*.weight_decay", self.weight_decay, "≥ 0")
        require(self.warmup_updates >= 0, "optim.*.warmup_updates", self.warmup_updates, "≥ 0")
        require(0 <= self.decay_share <= 1, "optim.*.decay_share", self.decay_share, "0 … 1")
        require(self.clip_norm > 0, "optim.*.clip_norm", self.clip_norm, "> 0, or inf")

    def rate(self, own_updates: int, progress: float) -> float:
        """Return the learning rate of an update; a function of its arguments, so resumable.

        Args:
            own_updates: Updates of this network so far.
            progress: Share of the run that is done, in [0, 1].
        """
        rise = min(1.0, (own_updates + 1) / (self.warmup_updates + 1))
        fall = 1.0 if self.decay_share == 0 else min(1.0, (1 - progress) / self.decay_share)
        return self.learning_rate * rise * max(fall, 0.0)


@dataclass(frozen=True, kw_only=True)
class GameSettings:
    """Who is updated when, and at which timesteps student and critic work.

    Attributes:
        critic_updates_per_student: Critic updates for each student update.
        critic_warmup_updates: Critic updates before the student's first.
        late_timesteps_updates: For this many student updates only the later half of its timesteps
            is drawn, (0, 0, ½, ½) for four; then all are, uniformly.
        backward_simulation_prob: Final probability that x_t comes from the student's own earlier
            estimate instead of the original.
        backward_simulation_ramp: Student updates at which that probability leaves 0, and reaches
            its final value.
        critic_log_snr: Range of the critic's log-SNR, drawn uniformly.
        critic_timesteps: First and last timestep that the critic's is clamped to; no narrower than
            that range.
    """

    critic_updates_per_student: int
    critic_warmup_updates: int
    late_timesteps_updates: int
    backward_simulation_prob: float
    backward_simulation_ramp: Sequence[int]
    critic_log_snr: Sequence[float]
    critic_timesteps: Sequence[int]

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "loss.game")
        every = self.critic_updates_per_student
        require(every >= 1, "loss.game.critic_updates_per_student", every, "≥ 1")
        require(
            self.critic_warmup_updates >= 0,
            "loss.game.critic_warmup_updates", self.critic_warmup_updates, "≥ 0",
        )  # fmt: skip
        prob = self.backward_simulation_prob
        require(0 <= prob <= 1, "loss.game.backward_simulation_prob", prob, "0 … 1")
        ramp = list(self.backward_simulation_ramp)
        rising = len(ramp) == 2 and 0 <= ramp[0] <= ramp[1]
        require(rising, "loss.game.backward_simulation_ramp", ramp, "[start, end] with start ≤ end")
        snr = list(self.critic_log_snr)
        require(len(snr) == 2 and snr[0] < snr[1], "loss.game.critic_log_snr", snr, "[low, high]")
        times = list(self.critic_timesteps)
        inside = len(times) == 2 and 0 <= times[0] <= times[1] < 1000
        require(inside, "loss.game.critic_timesteps", times, "[first, last] within 0 … 999")
        last, first = NoiseSchedule("linear").timestep_of_log_snr(torch.tensor(snr)).tolist()
        require(
            times[0] <= first and last <= times[1],
            "loss.game.critic_timesteps", times,
            f"[{first}, {last}], which loss.game.critic_log_snr={snr} is in timesteps: what lies "
            "beyond these ends would be looked at there",
        )  # fmt: skip

    def simulation_prob(self, student_update: int) -> float:
        """Return the probability of backward simulation at this student update."""
        start, end = self.backward_simulation_ramp
        if student_update < start:
            return 0.0
        done = 1.0 if end == start else min(1.0, (student_update - start) / (end - start))
        return self.backward_simulation_prob * done


@dataclass(frozen=True, kw_only=True)
class CriticTerms:
    """The critic's loss beside E[D(fake)] - E[D(real)].

    Attributes:
        penalty: ``r1_head``: γ/2·‖∂D/∂n(real)‖²; ``wgan_gp_head``: γ·(‖∂D/∂ñ‖ - 1)²; ``ar1``:
            γ·(D(real) - D(real + σξ))².
        penalty_weight: γ.
        ar1_sigma: σ of ``ar1``, in units of the image range [-1, 1].
        drift_weight: Weight of E[D(real)²].
    """

    penalty: Penalty
    penalty_weight: float
    ar1_sigma: float
    drift_weight: float

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "loss.critic")
        kinds = get_args(Penalty)
        allowed = " or ".join(kinds)
        require(self.penalty in kinds, "loss.critic.penalty", self.penalty, allowed)
        weight = self.penalty_weight
        require(weight >= 0, "loss.critic.penalty_weight", weight, "≥ 0")
        require(self.ar1_sigma > 0, "loss.critic.ar1_sigma", self.ar1_sigma, "> 0")
        require(self.drift_weight >= 0, "loss.critic.drift_weight", self.drift_weight, "≥ 0")


@dataclass(frozen=True, kw_only=True)
class StudentTerms:
    """Weights of the student's terms; a term of weight 0 is not computed.

    Attributes:
        balance: Divide each term by the running norm of its gradient at pred_x_0, so that the
            weights are shares of the whole gradient. A Wasserstein loss with a zero-centred penalty
            has no scale of its own; without this, γ would silently set the mix.
        balance_floor: Smallest norm to divide by, as a share of the term's largest so far, so that
            the gradient of a collapsed critic is not amplified into a pattern.
    """

    adversarial: float
    l1: float
    feature_matching: float
    lowres_consistency: float
    balance: bool
    balance_floor: float

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "loss.student")
        floor = self.balance_floor
        require(0 <= floor <= 1, "loss.student.balance_floor", floor, "0 … 1")
        for name, weight in self.weights().items():
            require(weight >= 0, f"loss.student.{name}", weight, "≥ 0")
        require(any(self.weights().values()), "loss.student", self.weights(), "one weight > 0")

    def weights(self) -> dict[str, float]:
        """Return every term's weight by name."""
        return {
            "adversarial": self.adversarial,
            "l1": self.l1,
            "feature_matching": self.feature_matching,
            "lowres_consistency": self.lowres_consistency,
        }
