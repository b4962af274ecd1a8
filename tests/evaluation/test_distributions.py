import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

from ksr_distill.evaluation.distributions import (
    feature_distances,
    laplacian_pyramid,
    native_crops,
    sliced_wasserstein,
)
from ksr_distill.randomness import generator_for


def image(side=64, seed=0):
    return torch.rand(1, 3, side, side, generator=generator_for(seed)) * 2 - 1


def blur(images):
    return nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def test_the_pyramid_adds_up_to_the_image():
    original = image(37)
    bands = laplacian_pyramid(original, num_levels=3)
    rebuilt = bands[-1]
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 8
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)
    for band in reversed(bands[:-1]):
        spread = torch.zeros_like(band)
        spread[..., ::2, ::2] = rebuilt
        spread = nn.functional.pad(spread, (2, 2, 2, 2), mode="reflect")
        rebuilt = band + nn.functional.conv2d(spread, kernel, groups=3)
    torch.testing.assert_close(rebuilt, original, atol=1e-6, rtol=0)


def test_a_constant_image_has_empty_bands_up_to_its_edges():
    *bands, rest = laplacian_pyramid(torch.full((1, 3, 33, 48), 0.7), num_levels=4)
    assert max(band.abs().max().item() for band in bands) < 1e-6
    torch.testing.assert_close(rest, torch.full_like(rest, 0.7))


def test_sliced_wasserstein_is_scipys_distance_of_the_same_projections():
    ours, theirs = blur(image()), image()
    distances = sliced_wasserstein(
        ours, theirs, generator=generator_for(1), num_patches=200, num_projections=5
    )
    generator = generator_for(1)
    for level, (a, b) in enumerate(
        zip(*(laplacian_pyramid(x, num_levels=4) for x in (ours, theirs)), strict=True)
    ):
        side = b.shape[-1] - 6
        places = torch.randint(side * side, (200,), generator=generator).tolist()
        directions = torch.randn(5, 147, generator=generator).numpy()
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        mean, std = (f(b.numpy(), axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
        std *= np.sqrt(b[0, 0].numel() / (b[0, 0].numel() - 1))
        sets = [
            [x[0, :, p // side :, p % side :][:, :7, :7].reshape(147) for p in places]
            for x in ((a.numpy() - mean) / std, (b.numpy() - mean) / std)
        ]
        expected = np.mean(
            [wasserstein_distance(*(np.array(s) @ d for s in sets)) for d in directions]
        )
        assert distances[level].item() == pytest.approx(1e3 * expected, rel=1e-4)


def test_equal_images_are_no_distance_apart_and_weak_detail_is_seen():
    original = image(seed=2)
    finest, _ = laplacian_pyramid(original, num_levels=2)
    assert sliced_wasserstein(original, original, generator=generator_for(0)).max().item() == 0
    weak = original - 0.5 * finest
    distances = sliced_wasserstein(weak, original, generator=generator_for(0))
    assert distances[0].item() > 50  # the paper's own normalisation would hide it
    assert distances.argmax().item() == 0


def test_places_and_directions_are_a_function_of_the_generator():
    ours, theirs = blur(image()), image()
    first, again, other = (
        sliced_wasserstein(ours, theirs, generator=generator_for(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_small_images_are_refused_for_patches():
    with pytest.raises(ValueError, match=r"40x40 px are too small.*at least 56 px"):
        sliced_wasserstein(image(40), image(40), generator=generator_for(0))


class MeanColour(nn.Module):
    num_features = 3

    def forward(self, crops):
        return crops.mean(dim=(2, 3))


def test_fid_of_a_shift_is_the_square_of_its_length():
    # Equal covariances: FID = |difference of the means|² = 3 · 0.1².
    crops = 3 * torch.rand(64, 3, 8, 8, generator=generator_for(5)) - 1
    distances = feature_distances(crops + 0.1, crops, network=MeanColour(), seed=0)
    assert distances.fid == pytest.approx(0.03, abs=1e-4)
    assert feature_distances(crops, crops, network=MeanColour(), seed=0).fid == pytest.approx(
        0, abs=1e-6
    )


def test_kid_is_the_unbiased_estimate_of_its_paper():
    crops = 3 * torch.rand(400, 3, 4, 4, generator=generator_for(6)) - 1
    others = 3 * torch.rand(400, 3, 4, 4, generator=generator_for(7)) - 0.5
    ours, theirs = (MeanColour()(x).numpy().astype(np.float64) for x in (others, crops))

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = off_diagonal(kernel(ours, ours)) + off_diagonal(kernel(theirs, theirs))
    expected -= 2 * kernel(ours, theirs).mean()
    distances = feature_distances(others, crops, network=MeanColour(), seed=0)
    assert distances.kid == pytest.approx(expected, rel=0.05)


def test_kid_draws_nothing_from_the_global_generator():
    crops = torch.rand(32, 3, 8, 8, generator=generator_for(8))
    first = feature_distances(crops * 0.9, crops, network=MeanColour(), seed=1)
    torch.rand(1)
    before = torch.get_rng_state()
    assert feature_distances(crops * 0.9, crops, network=MeanColour(), seed=1) == first
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_crops_say_so():
    class Wide(MeanColour):
        num_features = 64

        def forward(self, crops):
            return crops.flatten(1)[:, :64]

    crops = torch.rand(40, 3, 8, 8, generator=generator_for(9))
    distances = feature_distances(crops, crops, network=Wide(), seed=0)
    assert distances.fid == "skipped: 40 crops are too few for 64 features"
    assert isinstance(distances.kid, float)
    assert "skipped" in feature_distances(crops[:9], crops[:9], network=Wide(), seed=0).kid


def test_native_crops_are_cut_not_resized():
    original = image(50)
    crops = native_crops(original, crop_px=16)
    assert crops.shape == (9, 3, 16, 16)
    assert torch.equal(crops[5], original[0, :, 16:32, 32:48])
