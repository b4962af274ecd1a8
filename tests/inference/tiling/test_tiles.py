import pytest
import torch

from ksr_distill.inference.pictures.rasters import TensorRaster, Window
from ksr_distill.inference.tiling import tiles as tiles_module
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import SuperResolutionPass, Tiling, run_passes
from ksr_distill.inference.tiling.tiles import BlendedRaster, MemoryStore, plan_axis, plan_tiles
from tests.inference.conftest import make_unet, photo_like


@pytest.mark.parametrize("align", [2, 8, 64])
@pytest.mark.parametrize("tile", [128, 320, 1024])
@pytest.mark.parametrize("overlap_share", [0, 16, 8, 4])
def test_weights_sum_to_one_wherever_tiles_lie(align, tile, overlap_share):
    overlap = tile // overlap_share if overlap_share else 0
    for length in range(align, 3000, max(align * 7, 40)):
        plan = plan_axis(length, tile=tile, overlap=overlap, align=align)
        total, count = torch.zeros(length), torch.zeros(length)
        for index, start in enumerate(plan.starts):
            weights = plan.weights(index)
            total[start : start + plan.tile] += weights
            count[start : start + plan.tile] += weights > 0
        torch.testing.assert_close(total, torch.ones(length))
        assert count.max() <= 2
        assert plan.starts[0] == 0
        assert plan.starts[-1] + plan.tile == length
        assert plan.tile <= tile
        assert all(start % align == 0 for start in plan.starts)


def test_tiles_are_no_larger_than_it_takes():
    assert plan_axis(2048, tile=1024, overlap=128, align=8).tile == 768
    assert plan_axis(2048, tile=1088, overlap=128, align=8).starts == (0, 960)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (100, 8, r"tile=100 is not a multiple of 8.*use 96"),
        (64, 17, r"overlap=17 is outside 0…16.*use 8"),
        (64, -1, r"overlap=-1 is outside"),
        (8, 1, r"tile=8 is one stride.*overlap of 1; use 32"),
    ],
)
def test_a_tile_that_cannot_be_is_refused_with_one_that_can(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        plan_tiles(640, 640, tile_px=tile, overlap_px=overlap, align=8)


def test_windows_of_the_blend_are_windows_of_the_picture():
    picture = photo_like(176, 240)
    plan = plan_tiles(176, 240, tile_px=64, overlap_px=16, align=8)
    store = MemoryStore()
    for index in range(len(plan)):
        store.write(index, TensorRaster(picture).read(plan.window(index)))
    raster = BlendedRaster(plan, store, 170, 231)
    torch.testing.assert_close(raster.read(Window(0, 0, 170, 231)), picture[:, :170, :231])
    part = raster.read(Window(37, 61, 90, 101))
    torch.testing.assert_close(part, picture[:, 37:127, 61:162])


def enlarge_in_tiles(picture, denoise, tiling):
    """One step without noise, so that only what tiles do not see of each other differs."""
    work = SuperResolutionPass(
        denoise=lambda x_t, t, lowres: denoise(torch.zeros_like(x_t), t, lowres),
        timesteps=(979,),
        noise=PlaceNoise(1),
        factor=2,
        align=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    raster = run_passes(TensorRaster(picture), [work], tiling=tiling)
    return raster.read(Window(0, 0, raster.height, raster.width)), raster.plan


def seam_ratio(image, plan):
    """Mean absolute difference across the tiles' borders, over that inside the tiles."""
    differences = (image[:, :, 1:] - image[:, :, :-1]).abs().mean((0, 1))
    is_border = torch.zeros(len(differences), dtype=torch.bool)
    for left, right in zip(plan.columns.starts, plan.columns.starts[1:], strict=False):
        is_border[(left + plan.columns.tile + right) // 2 - 1] = True
    return float(differences[is_border].mean() / differences[~is_border].mean())


@pytest.fixture(scope="module")
def disagreeing_unet():
    """Its GroupNorms see other statistics in each tile, so neighbours differ visibly."""
    unet = make_unet(predict_residual=True)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet


def gradient(height, width):
    return torch.linspace(-0.6, 0.6, width).expand(3, height, width).contiguous()


def without_blending(monkeypatch):
    monkeypatch.setattr(tiles_module, "rising", lambda n: (torch.arange(n) >= n // 2).float())


def test_a_gradient_shows_no_seam(disagreeing_unet):
    image, plan = enlarge_in_tiles(gradient(48, 160), disagreeing_unet, Tiling(96, 24))
    assert len(plan) == 5
    assert seam_ratio(image, plan) <= 1


def test_a_gradient_shows_seams_when_blending_is_taken_out(disagreeing_unet, monkeypatch):
    without_blending(monkeypatch)
    image, plan = enlarge_in_tiles(gradient(48, 160), disagreeing_unet, Tiling(96, 24))
    assert seam_ratio(image, plan) > 1.2


def steps_against_untiled(unet):
    """The seam ratio of what tiling changes in a photo: its own edges cancel."""
    photo = photo_like(96, 160)
    whole, _ = enlarge_in_tiles(photo, unet, Tiling(1024))
    tiled, plan = enlarge_in_tiles(photo, unet, Tiling(96, 24))
    return seam_ratio(tiled - whole, plan)


def test_a_photo_shows_no_seam(disagreeing_unet):
    assert steps_against_untiled(disagreeing_unet) <= 1


def test_a_photo_shows_seams_when_blending_is_taken_out(disagreeing_unet, monkeypatch):
    without_blending(monkeypatch)
    assert steps_against_untiled(disagreeing_unet) > 1.2


def test_tiles_equal_the_whole_where_the_network_does_not_reach_over_their_borders():
    unet = make_unet()
    for module in unet.modules():  # GroupNorm reaches everywhere; without it reach is a number
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    photo = photo_like(24, 160)
    whole, _ = enlarge_in_tiles(photo, unet, Tiling(1024))
    reach = 34  # px, over all convolutions and both changes of resolution

    cut, plan = enlarge_in_tiles(photo, unet, Tiling(160, 0))
    assert plan.columns.starts == (0, 160)
    same = (cut - whole).abs().amax((0, 1)) < 1e-6
    assert same[: 160 - reach].all()
    assert same[160 + reach :].all()
    assert not same[155:165].all()

    blended, plan = enlarge_in_tiles(photo, unet, Tiling(192, 16))
    assert (plan.columns.starts, plan.columns.tile) == ((0, 128), 192)
    torch.testing.assert_close(blended, whole, atol=1e-6, rtol=0)
