import torch

from ksr_distill.levels import from_levels, round_to_8_bit, to_levels


def test_rounding_clamps_and_goes_to_the_nearest_of_256_levels():
    images = torch.tensor([-2.0, -1, 0.0001, 0.999, 3])
    rounded = round_to_8_bit(images)
    torch.testing.assert_close((rounded + 1) * 127.5, torch.tensor([0.0, 0, 128, 255, 255]))


def test_every_level_comes_back_as_it_was():
    levels = torch.arange(256, dtype=torch.uint8)
    images = from_levels(levels)
    assert (images.dtype, images.min(), images.max()) == (torch.float32, -1, 1)
    assert torch.equal(to_levels(images).byte(), levels)


def test_doubles_stay_doubles():
    assert round_to_8_bit(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
