"""The game's losses: tensors in, a float32 scalar out."""

from ksr_distill.losses.penalties import (
    approximate_r1_penalty,
    r1_head_penalty,
    scores_and_r1,
    wgan_gp_head_penalty,
)
from ksr_distill.losses.student import feature_matching_loss, lowres_consistency_loss, weighted_l1
from ksr_distill.losses.wasserstein import critic_loss, drift_penalty, mean_score, student_loss

__all__ = [
    "approximate_r1_penalty",
    "critic_loss",
    "drift_penalty",
    "feature_matching_loss",
    "lowres_consistency_loss",
    "mean_score",
    "r1_head_penalty",
    "scores_and_r1",
    "student_loss",
    "weighted_l1",
    "wgan_gp_head_penalty",
]
