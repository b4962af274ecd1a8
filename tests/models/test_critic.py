"""The critic: frozen trunk, trained heads, float32 scores."""

import torch

from ksr_distill.models import Critic, KSRUNet
from tests.models.test_unet import TINY, inputs


def critic(**options):
    torch.manual_seed(0)
    trunk = KSRUNet(**TINY, dropout=0.5)
    return Critic(trunk, head_channels=8, **{"normalise_features": True, **options})


def test_trunk_stays_frozen_and_in_eval_mode():
    subject = critic().train()
    assert not any(p.requires_grad for p in subject.trunk.parameters())
    assert not any(module.training for module in subject.trunk.modules())
    assert all(module.training for module in subject.heads.modules())


def test_features_are_the_same_twice_in_spite_of_dropout():
    subject = critic().train()
    first, second = subject.features(*inputs()), subject.features(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_reaches_the_picture_but_not_the_trunk():
    subject = critic()
    x_t, t, lowres = inputs()
    x_t.requires_grad_()
    sum(s.mean() for s in subject.heads(subject.features(x_t, t, lowres), t)).backward()
    assert x_t.grad.abs().sum() > 0
    assert all(p.grad is None for p in subject.trunk.parameters())


def test_normalised_features_do_not_depend_on_the_features_scale():
    subject = critic()
    level = subject.features(*inputs())[0]
    groups = level.unflatten(1, (subject.num_groups, -1)).flatten(2)
    assert torch.allclose(groups.mean(-1), torch.zeros_like(groups.mean(-1)), atol=1e-5)
    assert torch.allclose(groups.std(-1, unbiased=False), torch.ones(()), atol=1e-2)


def test_scores_are_a_float32_map_a_level_even_under_autocast():
    subject = critic()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = subject.heads(subject.features(*inputs()), inputs()[1])
    assert [tuple(s.shape) for s in scores] == [(2, 1, 8, 8), (2, 1, 8, 8)]
    assert all(s.dtype == torch.float32 for s in scores)


def test_conditioning_reaches_the_scores():
    subject = critic()
    x_t, t, lowres = inputs()
    a, b = (subject.heads(subject.features(x_t, t, c), t)[0] for c in (lowres, lowres.flip(0)))
    assert not torch.allclose(a, b)
