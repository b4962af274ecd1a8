import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from ksr_distill.inference.pictures.rasters import (
    ResampledRaster,
    TensorRaster,
    Window,
    read_reflected,
)
from tests.inference.conftest import photo_like

PICTURE = photo_like(40, 56)


def test_the_mirror_at_the_edges_is_torchs():
    padded = read_reflected(TensorRaster(PICTURE), Window(0, 0, 48, 64))
    assert torch.equal(padded, F.pad(PICTURE[None], (0, 8, 0, 8), mode="reflect")[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1), (2, 2)])
def test_a_window_may_be_many_times_larger_than_the_picture(size):
    picture = photo_like(*size)
    padded = read_reflected(TensorRaster(picture), Window(0, 0, 16, 24))
    assert padded.shape == (3, 16, 24)
    expected = np.pad(picture.numpy(), ((0, 0), (0, 16 - size[0]), (0, 24 - size[1])), "reflect")
    np.testing.assert_array_equal(padded.numpy(), expected)


@pytest.mark.parametrize("size", [(80, 112), (25, 31), (40, 56), (39, 100)])
def test_resizing_is_pillows_bicubic(size):
    resized = ResampledRaster(TensorRaster(PICTURE), *size).read(Window(0, 0, *size))
    for channel in range(3):
        image = PIL.Image.fromarray(PICTURE[channel].numpy())
        expected = np.asarray(image.resize(size[::-1], PIL.Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[channel].numpy(), expected, atol=2e-6)


def test_a_window_of_the_resized_is_a_window_of_the_whole():
    raster = ResampledRaster(TensorRaster(PICTURE), 61, 99)
    whole = raster.read(Window(0, 0, 61, 99))
    assert torch.equal(raster.read(Window(17, 30, 20, 41)), whole[:, 17:37, 30:71])
