"""Every loss on a case worked by hand."""

import pytest
import torch

from ksr_distill.losses import (
    approximate_r1_penalty,
    critic_loss,
    drift_penalty,
    feature_matching_loss,
    lowres_consistency_loss,
    r1_head_penalty,
    scores_and_r1,
    student_loss,
    weighted_l1,
    wgan_gp_head_penalty,
)
from ksr_distill.models import CriticHeads


def maps(*values):
    """One 2×2 map of equal scores per level, for two samples."""
    return [torch.full((2, 1, 2, 2), float(value)) for value in values]


def test_wasserstein_is_the_difference_of_means_over_levels():
    assert critic_loss(maps(3, 5), maps(1, 1)).item() == -3.0
    assert student_loss(maps(1, 3)).item() == -2.0
    assert drift_penalty(maps(1, 3)).item() == 5.0


def test_large_and_small_levels_count_alike():
    real = [torch.zeros(1, 1, 8, 8), torch.full((1, 1, 2, 2), 4.0)]
    assert student_loss(real).item() == -2.0


class LinearHeads:
    """D_k = weight · n_k, place by place."""

    def __init__(self, weight):
        self.weight = weight[:, None, None]

    def scores_and_slopes(self, features, _t):
        scores = [(n * self.weight).sum(1, keepdim=True) for n in features]
        return scores, [self.weight.expand_as(n) for n in features]


def test_r1_of_a_linear_critic_is_its_squared_slope_whatever_the_size():
    weight = torch.tensor([3.0, 4.0])
    for side in (2, 8):
        features = [torch.randn(2, 2, side, side)]
        heads = LinearHeads(weight)
        scores, penalty = scores_and_r1(heads, features, torch.zeros(2))
        assert penalty.item() == pytest.approx(25.0, rel=1e-5)
        assert torch.equal(scores[0], heads.scores_and_slopes(features, None)[0][0])


def test_r1_is_the_mean_over_levels_and_places():
    slopes = [torch.full((2, 3, 2, 2), 2.0), torch.zeros(2, 5, 1, 1)]
    assert r1_head_penalty(slopes).item() == 6.0


def test_r1_can_be_lowered_by_the_critic():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    scores_and_r1(LinearHeads(weight), [torch.randn(1, 2, 4, 4)], torch.zeros(1))[1].backward()
    assert torch.allclose(weight.grad, torch.tensor([6.0, 8.0]))


def test_r1_by_written_slopes_is_r1_by_a_second_graph():
    torch.manual_seed(0)
    heads = CriticHeads((8, 16), channels=8)
    features = [torch.randn(2, 8, 4, 4), torch.randn(2, 16, 2, 2)]
    t = torch.tensor([20, 300])

    def of_weights(loss):
        return torch.autograd.grad(loss, list(heads.parameters()), allow_unused=True)

    scores, penalty = scores_and_r1(heads, features, t)
    ours = of_weights(penalty + scores[0].mean())
    leaves = [n.clone().requires_grad_() for n in features]
    levels = heads(leaves, t)
    total = torch.stack([level.sum() for level in levels]).sum()
    slopes = torch.autograd.grad(total, leaves, create_graph=True)
    theirs = of_weights(r1_head_penalty(slopes) + levels[0].mean())
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (3.0, 4.0)])
def test_wgan_gp_is_zero_at_slope_one(slope, expected):
    heads = LinearHeads(torch.tensor([slope]))
    real, fake = [torch.randn(2, 1, 4, 4)], [torch.randn(2, 1, 4, 4)]
    penalty = wgan_gp_head_penalty(heads, real, fake, torch.zeros(2), torch.rand(2, 1, 1, 1))
    assert penalty.item() == pytest.approx(expected, abs=1e-5)


def test_approximate_r1_is_the_squared_change_of_scores():
    assert approximate_r1_penalty(maps(1, 5), maps(3, 5)).item() == 2.0


def test_l1_counts_by_its_weight():
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    weight = torch.tensor([1.0, 0.0])[:, None, None, None]
    assert weighted_l1(a, b, weight).item() == 0.5


def test_lowres_consistency_ignores_detail_and_sees_colour():
    image = torch.zeros(1, 3, 4, 4)
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2).expand(1, 3, 4, 4)
    assert lowres_consistency_loss(image + checkerboard, image, scale=2).item() == 0.0
    assert lowres_consistency_loss(image + 0.25, image, scale=2).item() == 0.25


def test_feature_matching_is_the_mean_over_levels():
    assert feature_matching_loss(maps(1, 2), maps(0, 5)).item() == 2.0
