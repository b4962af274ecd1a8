import logging
import random

import pytest
import torch

from ksr_distill.inference.pictures.rasters import TensorRaster, Window
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import SuperResolutionPass, Tiling, run_passes
from tests.inference.conftest import photo_like

PHOTO = photo_like(40, 72)


def passes_of(unet, count=2):
    return [
        SuperResolutionPass(
            denoise=unet,
            timesteps=(979, 479),
            noise=PlaceNoise(11, stage),
            factor=2,
            align=8,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for stage in range(count)
    ]


def enlarged(passes, **options):
    options = {"tiling": Tiling(64, 16)} | options
    raster = run_passes(TensorRaster(PHOTO), passes, **options)
    return raster.read(Window(0, 0, raster.height, raster.width))


@pytest.fixture(scope="module")
def in_order(unet):
    return enlarged(passes_of(unet))


def test_each_pass_doubles(in_order):
    assert in_order.shape == (3, 160, 288)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_visiting_order_gives_the_same_pixels(unet, in_order, seed):
    def shuffled(missing):
        return random.Random(seed).sample(missing, len(missing))

    assert torch.equal(enlarged(passes_of(unet), order=shuffled), in_order)


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_any_batch_of_tiles_gives_the_same_pixels(unet, in_order, batch):
    assert torch.equal(enlarged(passes_of(unet), tiling=Tiling(64, 16, batch)), in_order)


class DoublingWithLittleMemory:
    """Repeats each pixel, and runs out of memory above a number of output pixels."""

    stage, factor, dtype = 0, 2, torch.float32
    largest_tile_px = widest_overlap_px = None

    def __init__(self, pixels, align=8):
        self.pixels = pixels
        self.align = align

    def working_bytes(self, tile_px, batch):
        return 4 * batch * tile_px**2

    def __call__(self, tiles, windows):
        if len(windows) * windows[0].height * windows[0].width > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return tiles.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_a_batch_without_tiles_is_refused():
    with pytest.raises(ValueError, match="tile_batch_size=0 is not allowed; use a number ≥ 1"):
        Tiling(64, batch=0)


def test_out_of_memory_halves_the_batch_and_then_the_tile(caplog):
    with caplog.at_level(logging.WARNING):
        result = enlarged([DoublingWithLittleMemory(64 * 64)], tiling=Tiling(128, 16, batch=2))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: going on with 1 tile of 128 px at once",
        "out of memory: going on with 1 tile of 64 px at once",
    ]
    expected = PHOTO.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    torch.testing.assert_close(result, expected)


def test_out_of_memory_with_the_smallest_tile_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match=r"out of memory with tile=64.*--device cpu"):
        enlarged([DoublingWithLittleMemory(10)])


def test_out_of_memory_leaves_room_for_an_overlap_beside_a_wide_stride():
    with pytest.raises(ValueError, match=r"out of memory with tile=128, the smallest"):
        enlarged([DoublingWithLittleMemory(10, align=64)], tiling=Tiling(128))


def test_other_errors_of_the_network_are_not_taken_for_memory(unet):
    def broken(x_t, t, lowres):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    work = [SuperResolutionPass(**{**vars(p), "denoise": broken}) for p in passes_of(unet, count=1)]
    with pytest.raises(RuntimeError, match="mat1"):
        enlarged(work)


def test_a_megapixel_doubled_is_four_tiles_on_a_cpu_with_little_computed_twice(unet):
    plan = Tiling(1280).plan(2000, 2000, passes_of(unet, 1)[0])
    assert len(plan) == 4
    computed = len(plan) * plan.rows.tile * plan.columns.tile
    assert computed / 2000**2 < 1.06
