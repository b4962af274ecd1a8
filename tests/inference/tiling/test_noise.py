import pytest
import torch

from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.tiling.noise import MASK, PlaceNoise, philox_4x32

FIELD = PlaceNoise(seed=1234, stage=3).draw(2, Window(1000, 2000, 512, 512), channels=4)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key=key)
    assert tuple(int(word) for word in words) == expected


def test_a_window_is_cut_out_of_one_endless_picture():
    part = PlaceNoise(1234, 3).draw(2, Window(1100, 2031, 17, 230), channels=4)
    torch.testing.assert_close(part, FIELD[:, 100:117, 31:261])


def test_fewer_channels_are_the_first_of_more():
    window = Window(5, 7, 9, 11)
    assert torch.equal(
        PlaceNoise(1).draw(0, window, channels=3), PlaceNoise(1).draw(0, window, channels=9)[:3]
    )


def test_the_field_is_standard_normal():
    flat = FIELD.flatten().double()  # a million draws: standard errors .001, .0014, .005, .0024
    assert abs(flat.mean()) < 0.005
    assert abs(flat.var() - 1) < 0.007
    assert abs((flat**4).mean() - 3) < 0.025
    assert abs((flat**3).mean()) < 0.012
    inside = (flat.abs() < 1).double().mean()
    assert abs(inside - 0.6827) < 0.0025


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0)])
def test_neighbours_know_nothing_of_each_other(shift):
    dy, dx = shift
    moved = FIELD[:, dy:, dx:]
    kept = FIELD[:, : FIELD.shape[1] - dy, : FIELD.shape[2] - dx]
    assert abs((moved * kept).mean()) < 0.005


def test_channels_know_nothing_of_each_other():
    correlations = torch.corrcoef(FIELD.flatten(1))
    assert (correlations - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize(
    "other",
    [(PlaceNoise(1235, 3), 2), (PlaceNoise(1234, 2), 2), (PlaceNoise(1234, 3), 1),
     (PlaceNoise(1234 + 2**40, 3), 2)],
)  # fmt: skip
def test_seed_stage_and_draw_each_give_other_noise(other):
    noise, draw = other
    correlation = (noise.draw(draw, Window(1000, 2000, 512, 512), channels=4) * FIELD).mean()
    assert abs(correlation) < 0.005


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree_to_float_rounding():
    window = Window(10, 20, 300, 300)
    on_gpu = PlaceNoise(7).draw(1, window, device="cuda").cpu()
    torch.testing.assert_close(on_gpu, PlaceNoise(7).draw(1, window), rtol=1e-5, atol=1e-5)
