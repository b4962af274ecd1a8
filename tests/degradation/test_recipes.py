"""What every degradation promises, checked on the recipes as conf/ gives them."""

import time
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from ksr_distill.degradation import (
    Blur,
    DegradationPass,
    Noise,
    Resize,
    SecondOrderDegradation,
)
from ksr_distill.degradation.jpeg import jpeg_round_trip
from ksr_distill.randomness import generator_for
from tests.degradation.pictures import picture, psnr

CONF = Path(__file__).parents[2] / "conf" / "degradation"
RECIPES = [file.stem for file in sorted(CONF.glob("*.yaml"))]


def recipe(name, scale=2):
    group = OmegaConf.load(CONF / f"{name}.yaml")
    return hydra.utils.instantiate(OmegaConf.create({"scale": scale, "group": group}).group)


def test_the_three_recipes_are_there():
    assert RECIPES == ["bicubic", "jpeg", "second_order"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_recipe_keeps_the_contract(name, scale):
    degrade = recipe(name, scale)
    hires = torch.cat([picture(64, 96, seed) for seed in range(5)]).requires_grad_()
    lowres = degrade(hires, generator=generator_for(7, 1))
    assert degrade.scale == scale
    assert lowres.shape == (5, 3, 64 // scale, 96 // scale)
    assert lowres.dtype == torch.float32
    assert not lowres.requires_grad
    assert lowres.min() >= -1
    assert lowres.max() <= 1
    levels = (lowres + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_gives_the_same_lowres_whatever_was_drawn_before(name):
    degrade, hires = recipe(name), picture().repeat(6, 1, 1, 1)
    torch.manual_seed(1)
    first = degrade(hires, generator=generator_for(7, 1))
    torch.manual_seed(2)
    assert torch.equal(first, degrade(hires, generator=generator_for(7, 1)))


@pytest.mark.parametrize("name", ["jpeg", "second_order"])
def test_another_seed_gives_another_lowres(name):
    degrade, hires = recipe(name), picture().repeat(6, 1, 1, 1)
    lowres = [degrade(hires, generator=generator_for(7, update)) for update in (1, 2)]
    assert not torch.equal(*lowres)


@pytest.mark.parametrize("name", RECIPES)
def test_autocast_does_not_coarsen_the_lowres(name):
    degrade, hires = recipe(name), picture(64, 64).repeat(2, 1, 1, 1)
    plain = degrade(hires, generator=generator_for(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, degrade(hires, generator=generator_for(3)))


def test_second_order_damages_each_sample_in_its_own_way_yet_keeps_the_scene():
    hires = picture(128, 128).repeat(16, 1, 1, 1)
    clean = recipe("bicubic")(hires[:1], generator=generator_for(0))
    lowres = recipe("second_order")(hires, generator=generator_for(0))
    distances = [psnr(one[None], clean) for one in lowres]
    assert len(torch.unique(lowres.flatten(1), dim=0)) == 16
    assert max(distances) - min(distances) > 3
    assert min(distances) > 12  # scrambled pictures are below 10 dB
    assert max(distances) < 35


def test_second_order_keeps_the_place_of_things():
    """A shift would teach the model to shift back: the mean image lies where the clean one does."""
    hires = picture(128, 128).repeat(48, 1, 1, 1)
    clean = recipe("bicubic")(hires[:1], generator=generator_for(0))[0].mean(0)
    mean = recipe("second_order")(hires, generator=generator_for(1)).mean((0, 1))
    centred = torch.fft.rfft2(clean - clean.mean()), torch.fft.rfft2(mean - mean.mean())
    correlation = torch.fft.irfft2(centred[0].conj() * centred[1])
    assert correlation.argmax() == 0


def nothing_but_jpeg(quality):
    """A pass without blur, resize and noise."""
    return DegradationPass(
        blur=Blur(0.0, 0.0, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),
        resize=Resize((0.0, 0.0, 1.0), (1.0, 1.0)),
        noise=Noise(1.0, 0.0, (0.0, 0.0), (0.0, 0.0)),
        quality_min=quality,
        quality_max=quality,
    )


def test_each_pass_compresses_every_sample_exactly_once_before_or_after_the_last_resize():
    """At scale 1 every resize is the identity, and what is left is JPEG twice."""
    degrade = SecondOrderDegradation(1, nothing_but_jpeg(90), nothing_but_jpeg(10), 0.0)
    hires = picture(64, 64).repeat(16, 1, 1, 1)
    expected = jpeg_round_trip(hires[:1], torch.tensor([90.0]))
    expected = jpeg_round_trip(expected, torch.tensor([10.0]))
    lowres = degrade(hires, generator=generator_for(0))
    assert torch.allclose(lowres, expected.expand_as(lowres), atol=1e-5)


def test_the_last_sinc_filter_comes_as_often_as_it_should():
    degrade = [
        SecondOrderDegradation(1, nothing_but_jpeg(100), nothing_but_jpeg(100), prob)
        for prob in (0.0, 0.75)
    ]
    hires = picture(32, 32).repeat(200, 1, 1, 1)
    without, some = (one(hires, generator=generator_for(0)) for one in degrade)
    assert 0.65 < (without != some).flatten(1).any(1).float().mean() < 0.85


def test_second_order_refuses_images_that_its_kernels_do_not_fit():
    with pytest.raises(ValueError, match=r"8x8 px is smaller than 11 px"):
        recipe("second_order")(picture(16, 16), generator=generator_for(0))


def test_second_order_is_no_loop_over_samples():
    """Sixteen images cost far less than sixteen times one: the work is one batch."""
    degrade = recipe("second_order")

    def seconds(hires):
        degrade(hires, generator=generator_for(0))
        begin = time.perf_counter()
        degrade(hires, generator=generator_for(0))
        return time.perf_counter() - begin

    one, many = seconds(picture(24, 24)), seconds(picture(24, 24).repeat(16, 1, 1, 1))
    assert many < 8 * one
