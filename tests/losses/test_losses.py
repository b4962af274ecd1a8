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
    student_loss,
    weighted_l1,
    wgan_gp_head_penalty,
)


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


def test_r1_of_a_linear_critic_is_its_squared_slope_whatever_the_size():
    weight = torch.tensor([3.0, 4.0])
    for side in (2, 8):
        features = [torch.randn(2, 2, side, side, requires_grad=True)]
        scores = [(features[0] * weight[:, None, None]).sum(1, keepdim=True)]
        assert r1_head_penalty(scores, features).item() == pytest.approx(25.0, rel=1e-5)


def test_r1_can_be_lowered_by_the_critic():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    features = [torch.randn(1, 2, 4, 4, requires_grad=True)]
    r1_head_penalty(
        [(features[0] * weight[:, None, None]).sum(1, keepdim=True)], features
    ).backward()
    assert torch.allclose(weight.grad, torch.tensor([6.0, 8.0]))


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (3.0, 4.0)])
def test_wgan_gp_is_zero_at_slope_one(slope, expected):
    def heads(features, _t):
        return [slope * level for level in features]

    real, fake = [torch.randn(2, 1, 4, 4)], [torch.randn(2, 1, 4, 4)]
    penalty = wgan_gp_head_penalty(heads, real, fake, torch.zeros(2), generator=torch.Generator())
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
