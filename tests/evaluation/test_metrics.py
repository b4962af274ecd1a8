import math

import pytest
import torch
from torchmetrics.functional.image.psnr import peak_signal_noise_ratio

from ksr_distill.evaluation import metrics
from ksr_distill.levels import round_to_8_bit
from ksr_distill.randomness import generator_for


def noise(*shape, seed=0):
    return torch.rand(shape, generator=generator_for(seed)) * 2 - 1


def grid(side):
    return torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")


def test_luma_is_that_of_matlab():
    # MATLAB: rgb2ycbcr([0 0 0; 1 1 1; 1 0 0; 0 1 0; 0 0 1]) * 255, first column.
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    colours = colours[:, :, None, None] * 2 - 1
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966])
    torch.testing.assert_close(metrics.luma(colours).flatten(), expected)


def test_psnr_y_of_a_constant_shift_is_the_hand_worked_one():
    # A shift of d in [-1, 1] moves Y by d / 2 · 219.
    hires = noise(2, 3, 16, 16) / 2
    expected = 20 * math.log10(255 / (0.1 / 2 * 219))
    shifted = metrics.psnr_y(hires + 0.1, hires, border_px=2)
    torch.testing.assert_close(shifted, torch.full((2,), expected), atol=1e-3, rtol=0)


def test_psnr_y_is_torchmetrics_on_the_cropped_y_channel():
    images, hires = noise(3, 3, 20, 24), noise(3, 3, 20, 24, seed=1)
    ours, theirs = (metrics.luma(x)[..., 3:-3, 3:-3] for x in (images, hires))
    expected = peak_signal_noise_ratio(
        ours, theirs, data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(metrics.psnr_y(images, hires, border_px=3), expected)


def test_what_lies_in_the_border_does_not_count():
    hires = noise(1, 3, 12, 12)
    images = hires.clone()
    images[..., :2, :] += 0.5
    images[..., -2:] += 0.5
    assert metrics.psnr_y(images, hires, border_px=2).item() == metrics.MAX_PSNR_DB
    assert metrics.psnr_y(images, hires, border_px=1).item() < 40


def test_a_border_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="border_px=4 leaves nothing of 12x8 px"):
        metrics.psnr_y(noise(1, 3, 8, 12), noise(1, 3, 8, 12), border_px=4)


def test_lowres_consistency_sees_the_mean_of_each_block_and_nothing_else():
    hires = noise(1, 3, 16, 16) / 2
    y, x = grid(16)
    invented_detail = 0.3 * ((-1.0) ** (y + x))
    same = metrics.lowres_consistency_psnr(hires + invented_detail, hires, scale=2)
    shifted = metrics.lowres_consistency_psnr(hires + 0.02, hires, scale=2)
    assert same.item() > 95  # float32 rounding alone
    assert shifted.item() == pytest.approx(40, abs=1e-3)  # 20·log10(2 / 0.02)


def test_top_octave_power_ratio_counts_the_upper_half_of_the_band_alone():
    _, x = grid(64)
    low, high = (0.4 * torch.cos(2 * math.pi * f * x).expand(1, 3, 64, 64) for f in (0.125, 0.375))
    ratio = metrics.top_octave_power_ratio(low + 0.5 * high, 0.3 * low + high)
    assert ratio.item() == pytest.approx(0.25, abs=1e-4)


def test_a_frequency_of_exactly_a_quarter_is_below_the_top_octave():
    _, x = grid(64)
    at_the_edge = 0.4 * torch.cos(2 * math.pi * 0.25 * x).expand(1, 3, 64, 64)
    detail = noise(1, 3, 64, 64)
    ratio = metrics.top_octave_power_ratio(detail + at_the_edge, detail)
    assert ratio.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("position", "period"), [(0, 2), (1, 4), (2, 8)])
def test_a_planted_pattern_stands_out_at_its_period_alone(position, period):
    y, x = grid(256)
    hires = 0.1 * torch.randn(1, 3, 256, 256, generator=generator_for(3))
    pattern = 0.02 * torch.cos(2 * math.pi * x / period) * torch.cos(2 * math.pi * y / period)
    peaks = metrics.checkerboard_peaks(hires + pattern, hires)[0]
    assert peaks.argmax().item() == position
    others = peaks[[i for i in range(3) if i != position]]
    assert others.max().item() < 1.1


def test_the_height_of_a_checkerboard_peak_is_the_hand_worked_one():
    # Amplitude A in noise of deviation s, Hann window w: 1 + A²·(Σw)² / (s²·Σw²), and for a window
    # of 32 px in two dimensions (Σw)² / Σw² = (32 · 2/3)² = 455.
    y, x = grid(512)
    hires = 0.1 * torch.randn(1, 3, 512, 512, generator=generator_for(4))
    checkerboard = 0.01 * (-1.0) ** (y + x)
    peak = metrics.checkerboard_peaks(hires + checkerboard, hires)[0, 0].item()
    assert peak == pytest.approx(1 + 0.01 * 455, rel=0.1)


def test_a_faint_coloured_pattern_in_a_dark_corner_is_seen():
    y, x = grid(256)
    hires = round_to_8_bit(0.5 * torch.randn(1, 3, 256, 256, generator=generator_for(5)))
    hires[..., :96, :96] = -0.9
    images = hires.clone()
    images[:, 0, :64, :64] += (3 / 127.5) * ((-1.0) ** (y + x))[:64, :64]
    images[:, 2, :64, :64] -= (3 / 127.5) * ((-1.0) ** (y + x))[:64, :64]
    assert metrics.checkerboard_peaks(images, hires)[0, 0].item() > 2


def test_noise_and_blur_are_no_checkerboards():
    hires = round_to_8_bit(0.3 * torch.randn(1, 3, 256, 256, generator=generator_for(6)))
    noisy = hires + 0.1 * torch.randn(1, 3, 256, 256, generator=generator_for(7))
    taps = torch.tensor([1.0, 6, 1]) / 8
    kernel = (taps[:, None] * taps).expand(3, 1, 3, 3)
    blurred = torch.nn.functional.conv2d(hires, kernel, padding=1, groups=3)
    assert metrics.checkerboard_peaks(noisy, hires).max().item() < 1.2
    assert metrics.checkerboard_peaks(blurred, hires).max().item() < 1.2


def test_equal_images_have_every_peak_at_one():
    hires = noise(2, 3, 48, 40)
    torch.testing.assert_close(metrics.checkerboard_peaks(hires, hires), torch.ones(2, 3))


def test_white_noise_has_no_prominent_frequency():
    white = 0.3 * torch.randn(1, 3, 512, 512, generator=generator_for(8))
    prominence = metrics.spectral_prominence(white)
    # Inside: exp(-gamma) · Γ(1 - 1/16)^16 = 1.05 for 16 independent exponential neighbours.
    assert prominence[0, 4:-4, 4:-4].mean().item() == pytest.approx(1.05, abs=0.07)


def test_a_flat_tile_has_no_prominent_frequency():
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(
        metrics.spectral_prominence(flat), torch.ones(1, 32, 32), atol=2e-3, rtol=0
    )


def test_too_small_images_are_refused_for_checkerboards():
    with pytest.raises(ValueError, match="at least 32 px a side"):
        metrics.spectral_prominence(noise(1, 3, 31, 64))


def test_drift_is_per_channel_and_signed():
    hires = noise(1, 3, 32, 32) / 4
    images = (
        hires * torch.tensor([1.0, 2, 1])[:, None, None]
        + torch.tensor([0.1, 0, -0.2])[:, None, None]
    )
    mean = metrics.channel_mean_drift(images, hires)[0]
    std = metrics.channel_std_drift(images, hires)[0]
    assert mean[0].item() == pytest.approx(0.1, abs=1e-5)
    assert mean[2].item() == pytest.approx(-0.2, abs=1e-5)
    assert std[1].item() == pytest.approx(hires[0, 1].std().item(), abs=1e-5)
    assert std[0].item() == pytest.approx(0, abs=1e-5)


def test_share_out_of_range_counts_values():
    images = torch.zeros(1, 3, 10, 10)
    images[0, 0, 0, :6] = 1.5
    images[0, 2, 0, 0] = -1.01
    images[0, 1, 0, 0] = 1.0
    assert metrics.share_out_of_range(images).item() == pytest.approx(7 / 300)


@pytest.mark.parametrize(
    "measure",
    [
        lambda x: metrics.psnr_y(x, x, border_px=2),
        lambda x: metrics.lowres_consistency_psnr(x, x, scale=2),
        lambda x: metrics.top_octave_power_ratio(x, x),
        lambda x: metrics.checkerboard_peaks(x, x),
        metrics.share_out_of_range,
    ],
)
def test_monitors_can_measure_without_reading_a_tensor(measure):
    # A meta tensor has no values: whatever would wait for the device fails here.
    assert measure(torch.empty(2, 3, 64, 64, device="meta")).device.type == "meta"
