import io

import numpy as np
import pytest
import torch
from kornia.enhance import jpeg_codec_differentiable
from PIL import Image

from ksr_distill.degradation import JPEGDegradation
from ksr_distill.degradation.jpeg import jpeg_round_trip
from ksr_distill.randomness import generator_for
from tests.degradation.pictures import as_pillow, as_tensor, picture, psnr


def pillow_round_trip(image, quality):
    file = io.BytesIO()
    as_pillow(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return as_tensor(np.asarray(Image.open(file)))


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_the_damage_is_libjpegs_damage(quality):
    image = picture(90, 123)  # no multiple of the coded unit: the border is padded as in a file
    ours = jpeg_round_trip(image, torch.tensor([float(quality)]))
    theirs = pillow_round_trip(image, quality)
    assert psnr(ours, theirs) > psnr(image, theirs) + 12


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
def test_hard_rounding_is_nearer_to_a_file_than_kornias_soft_rounding(quality):
    """Why this codec is ours: kornia's, made for gradients, keeps detail that a file loses."""
    image = picture(96, 128)
    theirs = pillow_round_trip(image, quality)
    hard = jpeg_round_trip(image, torch.tensor([float(quality)]))
    soft = jpeg_codec_differentiable((image + 1) / 2, torch.tensor([float(quality)])) * 2 - 1
    assert psnr(hard, theirs) > psnr(soft, theirs) + 1


def test_each_sample_has_its_own_quality():
    images = picture().repeat(2, 1, 1, 1)
    both = jpeg_round_trip(images, torch.tensor([20.0, 90.0]))
    assert torch.equal(both[:1], jpeg_round_trip(images[:1], torch.tensor([20.0])))
    assert psnr(both[1:], images[1:]) > psnr(both[:1], images[:1]) + 3


def test_only_the_share_prob_meets_jpeg():
    hires = picture(32, 32).repeat(400, 1, 1, 1)
    degrade = JPEGDegradation(scale=2, quality_min=30, quality_max=30, prob=0.25)
    lowres = degrade(hires, generator=generator_for(0))
    clean = JPEGDegradation(2, 30, 30, 0.0)(hires[:1], generator=generator_for(0))
    share = (lowres != clean).flatten(1).any(1).float().mean()
    assert 0.18 < share < 0.32


def test_both_ends_of_the_quality_range_are_drawn():
    hires = picture(32, 32).repeat(64, 1, 1, 1)
    lowres = JPEGDegradation(2, 94, 95, 1.0)(hires, generator=generator_for(1))
    assert len(torch.unique(lowres.flatten(1), dim=0)) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 50), (60, 50), (30, 101)])
def test_a_quality_that_jpeg_does_not_know_is_refused(low, high):
    with pytest.raises(ValueError, match=f"JPEG quality {low} to {high}"):
        JPEGDegradation(2, low, high, 0.5)
