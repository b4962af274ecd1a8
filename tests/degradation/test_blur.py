import math

import pytest
import torch

from ksr_distill.degradation.blur import (
    Blur,
    draw_kernels,
    filter_where,
    gaussian_kernels,
    sinc_kernels,
)
from ksr_distill.randomness import generator_for
from tests.degradation.pictures import picture, psnr

FIRST = Blur(1.0, 0.1, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), (0.2, 3.0), (0.5, 4.0), (1.0, 2.0))


def gaussian(sigma_x, sigma_y, angle=0.0, beta=1.0, is_plateau=False, half_px=10):
    numbers = (torch.tensor([float(v)]) for v in (sigma_x, sigma_y, angle, beta))
    return gaussian_kernels(*numbers, torch.tensor([is_plateau]), torch.tensor([float(half_px)]))


def spread(kernel, axis):
    """Standard deviation of a kernel along x (axis 1) or y (axis 0), by hand."""
    place = torch.arange(-10.0, 11.0)
    return float((kernel[0].sum(1 - axis) * place.square()).sum().sqrt())


def test_a_gaussian_has_the_spread_that_was_asked_for():
    kernel = gaussian(2.0, 1.0)
    assert spread(kernel, axis=1) == pytest.approx(2.0, rel=1e-3)
    assert spread(kernel, axis=0) == pytest.approx(1.0, rel=1e-3)


def test_a_quarter_turn_swaps_the_axes():
    assert torch.allclose(gaussian(2.0, 1.0, angle=math.pi / 2), gaussian(1.0, 2.0), atol=1e-6)


def test_an_eighth_turn_puts_the_long_axis_on_the_diagonal():
    kernel = gaussian(3.0, 1.0, angle=math.pi / 4)[0]
    # Two pixels along and two across: 8 / sigma^2 on the long axis, and on the short one.
    assert float(kernel[12, 12] / kernel[10, 10]) == pytest.approx(math.exp(-8 / 9 / 2), rel=1e-4)
    assert float(kernel[8, 12] / kernel[10, 10]) == pytest.approx(math.exp(-8 / 2), rel=1e-4)


def test_the_general_forms_follow_their_equations():
    """Neighbour over centre at q = 1/4: exp(-q^beta / 2) and 1 / (1 + q^beta)."""
    for is_plateau, expected in [(False, math.exp(-(0.25**2) / 2)), (True, 1 / (1 + 0.25**2))]:
        kernel = gaussian(2.0, 2.0, beta=2.0, is_plateau=is_plateau)[0]
        assert float(kernel[10, 11] / kernel[10, 10]) == pytest.approx(expected, rel=1e-5)


def test_a_smaller_kernel_ends_where_it_should():
    kernel = gaussian(3.0, 3.0, half_px=3)[0]
    assert kernel[:, :7].abs().sum() == 0
    assert kernel[7:14, 7:14].min() > 0


def test_the_sinc_filter_keeps_low_and_stops_high_frequencies():
    kernel = sinc_kernels(torch.tensor([torch.pi / 2]), torch.tensor([10.0]))[0]
    response = torch.fft.fft(kernel.sum(0), 256).abs()
    assert response[256 // 8] == pytest.approx(1.0, abs=0.15)  # pi/4, within
    assert response[3 * 256 // 8] < 0.15  # 3 pi/4, beyond
    assert kernel.min() < 0  # it rings


def test_every_drawn_kernel_keeps_the_mean_and_few_are_alike():
    kernels = draw_kernels(256, FIRST, device=torch.device("cpu"), generator=generator_for(0))
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(256), atol=1e-5)
    assert len(torch.unique(kernels.flatten(1), dim=0)) == 256
    assert torch.isfinite(kernels).all()


def test_images_that_were_not_chosen_stay_as_they_were():
    images = picture().repeat(2, 1, 1, 1)
    kernels = gaussian(2.0, 2.0).repeat(2, 1, 1)
    filtered = filter_where(images, torch.tensor([False, True]), kernels)
    assert torch.allclose(filtered[0], images[0], atol=1e-6)
    assert psnr(filtered[1], images[1]) < 35


def test_the_border_of_a_flat_image_stays_flat():
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert torch.allclose(filter_where(flat, torch.tensor([True]), gaussian(3.0, 3.0)), flat)


def test_family_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"family_probs=.*6 shares that sum to 1"):
        Blur(1.0, 0.1, (0.5, 0.4), (0.2, 3.0), (0.5, 4.0), (1.0, 2.0))
