import numpy as np
import pytest
import torch
from PIL import Image

from ksr_distill.degradation import BicubicDegradation
from tests.degradation.pictures import as_pillow, as_tensor, picture, psnr


@pytest.mark.parametrize("scale", [2, 4])
def test_bicubic_is_what_pillow_does(scale):
    hires = picture()
    lowres = BicubicDegradation(scale)(hires, generator=torch.Generator())
    reduced = as_pillow(hires).resize((128 // scale, 96 // scale), Image.Resampling.BICUBIC)
    assert lowres.shape == (1, 3, 96 // scale, 128 // scale)
    assert psnr(lowres, as_tensor(np.asarray(reduced))) > 55


def test_a_quantised_image_survives_a_file_unchanged():
    lowres = BicubicDegradation(2)(picture(), generator=torch.Generator())
    again = as_tensor(np.asarray(as_pillow(lowres)))
    assert torch.allclose(lowres, again, atol=1e-6)
    raw = BicubicDegradation(2, quantise=False)(picture(), generator=torch.Generator())
    assert 0 < (raw - lowres).abs().max() <= 0.5 / 127.5 + 1e-6


def test_overshoot_at_edges_is_clamped():
    hires = torch.ones(1, 3, 32, 32)
    hires[..., 16:] = -1
    lowres = BicubicDegradation(2, quantise=False)(hires, generator=torch.Generator())
    assert lowres.min() == -1
    assert lowres.max() == 1


def test_sides_that_the_scale_does_not_divide_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"30x34 px, not a multiple of degradation.scale=4.*28x32"):
        BicubicDegradation(4)(torch.zeros(1, 3, 34, 30), generator=torch.Generator())


def test_a_scale_below_one_is_refused():
    with pytest.raises(ValueError, match=r"degradation.scale=0"):
        BicubicDegradation(0)
