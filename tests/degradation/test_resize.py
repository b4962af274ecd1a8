import pytest
import torch
import torch.nn.functional as F

from ksr_distill.degradation.resize import (
    Filter,
    Resize,
    fill_canvas,
    resampling_matrices,
    resize_each,
    resize_randomly,
)
from ksr_distill.randomness import generator_for
from tests.degradation.pictures import picture, psnr

MODES = {
    Filter.AREA: {"mode": "area"},
    Filter.BILINEAR: {"mode": "bilinear", "align_corners": False},
    Filter.BICUBIC: {"mode": "bicubic", "align_corners": False},
}


# PyTorch's area rounds its windows to whole pixels, ours weighs the parts: whole ratios agree.
@pytest.mark.parametrize(
    ("filter_", "size"),
    [(filter_, size) for filter_ in Filter for size in [(30, 20), (120, 160)]]
    + [(Filter.BILINEAR, (77, 50)), (Filter.BICUBIC, (77, 50))],
)
def test_each_filter_is_pytorchs_away_from_the_border(filter_, size):
    image = picture(60, 80)
    sizes = tuple(torch.tensor([float(side)]) for side in size)
    ours = resize_each(fill_canvas(image), sizes, size, torch.tensor([int(filter_)]))
    theirs = F.interpolate(image, size=size, **MODES[filter_])
    assert torch.allclose(ours[..., 4:-4, 4:-4], theirs[..., 4:-4, 4:-4], atol=2e-5)


def test_area_keeps_the_mean_at_any_factor():
    row = torch.rand(1, 60)
    matrix = resampling_matrices(
        torch.tensor([60.0]), torch.tensor([41.0]), 60, 41, torch.tensor([int(Filter.AREA)])
    )
    assert (matrix @ row[..., None]).mean() == pytest.approx(row.mean().item(), abs=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours_sizes():
    images = torch.cat([picture(60, 80), picture(60, 80, seed=1)])
    sizes = (torch.tensor([30.0, 77.0]), torch.tensor([40.0, 99.0]))
    filters = torch.tensor([int(Filter.BICUBIC)] * 2)
    both = resize_each(fill_canvas(images), sizes, (90, 120), filters)
    alone = resize_each(
        fill_canvas(images[:1]), (sizes[0][:1], sizes[1][:1]), (30, 40), filters[:1]
    )
    assert torch.allclose(both[:1, :, :30, :40], alone, atol=1e-5)


def test_beyond_the_valid_corner_the_border_repeats():
    image = picture(60, 80)
    sizes = (torch.tensor([30.0]), torch.tensor([40.0]))
    resized = resize_each(fill_canvas(image), sizes, (90, 120), torch.tensor([1]))
    assert torch.equal(resized[..., 29:30, :].expand(-1, -1, 61, -1), resized[..., 29:, :])
    assert torch.equal(resized[..., 39:40].expand(-1, -1, -1, 81), resized[..., 39:])


def test_what_lies_beyond_the_valid_corner_is_never_seen():
    canvas = fill_canvas(picture(60, 80))._replace(
        heights=torch.tensor([31.0]), widths=torch.tensor([40.0])
    )
    spoilt = canvas.images.clone()
    spoilt[..., 31:, :] = 100.0
    spoilt[..., 40:] = 100.0
    for filter_ in Filter:
        size = (torch.tensor([45.0]), torch.tensor([57.0])), (45, 57), torch.tensor([int(filter_)])
        clean = resize_each(canvas, *size)
        assert torch.allclose(clean, resize_each(canvas._replace(images=spoilt), *size), atol=1e-5)


def test_there_and_back_again_is_the_same_picture():
    canvas = fill_canvas(picture(60, 80))
    sizes = (torch.tensor([90.0]), torch.tensor([120.0]))
    larger = canvas._replace(
        images=resize_each(canvas, sizes, (100, 130), torch.tensor([2])),
        heights=sizes[0],
        widths=sizes[1],
    )
    back = resize_each(larger, (canvas.heights, canvas.widths), (60, 80), torch.tensor([2]))
    assert psnr(back, canvas.images) > 33


def test_random_sizes_stay_within_their_range_and_canvas():
    canvas = fill_canvas(picture(60, 80).repeat(200, 1, 1, 1))
    resize = Resize((0.2, 0.7, 0.1), (0.15, 1.5))
    resized = resize_randomly(canvas, (60, 80), resize, generator=generator_for(0))
    assert resized.images.shape == (200, 3, 90, 120)
    assert 9 <= resized.heights.min() < 15
    assert 80 < resized.heights.max() <= 90
    assert 0.6 < (resized.heights < 60).float().mean() < 0.8


@pytest.mark.parametrize(
    ("probs", "factor"), [((0.5, 0.5), (0.5, 1.5)), ((0.2, 0.7, 0.1), (1.1, 1.5))]
)
def test_shares_and_factors_that_make_no_sense_are_refused(probs, factor):
    with pytest.raises(ValueError, match="must"):
        Resize(probs, factor)
