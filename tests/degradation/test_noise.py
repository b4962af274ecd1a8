import pytest
import torch

from ksr_distill.degradation.noise import Noise, add_random_noise
from ksr_distill.randomness import generator_for


def noise_of(level, noise, seed=0):
    """Added noise in levels of 255, on flat images of one level."""
    images = torch.full((4, 3, 64, 64), level / 127.5 - 1)
    return (add_random_noise(images, noise, generator=generator_for(seed)) - images) * 127.5


def test_gaussian_noise_has_the_sigma_that_was_asked_for():
    added = noise_of(128, Noise(1.0, 0.0, (10.0, 10.0), (1.0, 1.0)))
    assert added.std().item() == pytest.approx(10.0, rel=0.03)


def test_poisson_noise_grows_with_the_root_of_the_light():
    shot = Noise(0.0, 0.0, (1.0, 1.0), (1.0, 1.0))
    for level in (16, 64, 144):
        assert noise_of(level, shot).std().item() == pytest.approx(level**0.5, rel=0.04)


@pytest.mark.parametrize("gaussian_prob", [0.0, 1.0])
def test_grey_noise_is_the_same_in_the_three_channels(gaussian_prob):
    grey = noise_of(128, Noise(gaussian_prob, 1.0, (10.0, 10.0), (1.0, 1.0)))
    colour = noise_of(128, Noise(gaussian_prob, 0.0, (10.0, 10.0), (1.0, 1.0)))
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-4)
    assert (colour[:, 0] - colour[:, 2]).std() > 5


def test_samples_differ_in_strength():
    added = noise_of(128, Noise(1.0, 0.0, (1.0, 30.0), (1.0, 1.0)))
    assert len(torch.unique(added.flatten(1).std(1).round(decimals=1))) == 4
