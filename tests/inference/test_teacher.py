import logging

import PIL.Image
import pytest
import torch

from ksr_distill.diffusion import sample_teacher
from ksr_distill.inference import KSRTeacherPipeline
from ksr_distill.inference.enlarging import draw_seeds
from ksr_distill.inference.pictures.rasters import TensorRaster, Window
from ksr_distill.inference.teacher import scale_of_released_file
from ksr_distill.inference.teacher_pass import views_that_fit
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import Tiling
from ksr_distill.models.weights import sr_unet_from_released
from tests.golden import golden_shapes, golden_weights


@pytest.fixture(scope="module")
def unet():
    return sr_unet_from_released(golden_weights(golden_shapes("tiny_state_dicts/sr_unet")))


@pytest.fixture
def teacher(unet):
    return KSRTeacherPipeline(sr=unet, scale=2, num_inference_steps=2, window_px=32, stride_px=24)


def photo(height=20, width=28):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(5))


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def test_the_pipeline_is_the_released_sampler_on_the_noise_of_the_place(teacher, unet):
    out = teacher(photo(), generator=seeded(), output_type="pt").images[0]

    seed = draw_seeds(seeded(), 1)[0]
    sample = sample_teacher(
        unet,
        photo()[None] * 2 - 1,
        start=PlaceNoise(seed, 0).draw(0, Window(0, 0, 40, 56))[None],
        num_inference_steps=2,
        window_px=32,
        stride_px=24,
        view_batch_size=1,
    )
    assert torch.allclose(out, (sample[0].clamp(-1, 1) + 1) / 2, atol=1e-6)


def test_the_batch_of_views_does_not_change_the_picture(teacher):
    one, all_at_once = (
        teacher(photo(), view_batch_size=size, generator=seeded(), output_type="pt").images
        for size in (1, 100)
    )
    assert torch.allclose(one, all_at_once, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "size"), [(1, (9, 7)), (2, (18, 14)), (3, (27, 21)), (4, (36, 28))]
)
def test_any_scale_and_any_size(teacher, scale, size):
    out = teacher(photo(9, 7), scale=scale, output_type="pt").images[0]
    assert out.shape == (3, *size)


def test_a_teacher_of_four_enlarges_by_four_at_once(unet):
    teacher = KSRTeacherPipeline(sr=unet, scale=4, num_inference_steps=1)
    assert teacher(photo(10, 13), output_type="np").images.shape == (1, 40, 52, 3)


def test_transparency_is_enlarged_beside_the_colours(teacher):
    rgba = PIL.Image.new("RGBA", (12, 10), (230, 200, 40, 255))
    rgba.paste((0, 0, 0, 0), (6, 0, 12, 10))
    big = teacher(rgba).images[0]
    assert (big.mode, big.size) == ("RGBA", (24, 20))
    assert (big.getpixel((2, 2))[3], big.getpixel((21, 2))[3]) == (255, 0)


def test_a_canvas_above_the_largest_tile_is_blended_from_whole_samples(unet):
    teacher = KSRTeacherPipeline(sr=unet, num_inference_steps=2, window_px=32, stride_px=24)
    source = TensorRaster(photo(40, 60) * 2 - 1)
    tiled = teacher.enlarge(source, seed=1, tiling=Tiling(64, 8))
    assert len(tiled.plan) == 4
    assert (tiled.height, tiled.width) == (80, 120)
    first, (only_pass,) = tiled.plan.window(0), teacher.passes(2, seed=1)
    lowres = source.read(Window(0, 0, first.height // 2, first.width // 2))
    with torch.no_grad():
        sample = only_pass(lowres[None], [first])[0].clamp(-1, 1)
    alone = Window(0, 0, 36, 56)  # no other tile reaches here
    assert torch.equal(tiled.read(alone), sample[:, : alone.height, : alone.width])


def test_the_folder_gives_the_same_pixels(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    loaded = KSRTeacherPipeline.from_pretrained(tmp_path)
    settings = ("scale", "num_inference_steps", "window_px", "stride_px")
    assert all(loaded.config[key] == teacher.config[key] for key in settings)
    ours, theirs = (
        p(photo(), generator=seeded(), output_type="pt").images for p in (teacher, loaded)
    )
    assert torch.equal(ours, theirs)


def test_out_of_memory_halves_the_views_and_says_so(teacher, monkeypatch, caplog):
    asked = []

    def sample_in_little_memory(*args, view_batch_size, **kwargs):
        asked.append(view_batch_size)
        if view_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_teacher(*args, view_batch_size=view_batch_size, **kwargs)

    monkeypatch.setattr(
        "ksr_distill.inference.teacher_pass.sample_teacher", sample_in_little_memory
    )
    with caplog.at_level(logging.WARNING):
        teacher(photo(), view_batch_size=5)

    assert asked == [4, 2]  # four views are all there are
    assert "going on with view_batch_size=2" in caplog.text


def test_the_views_that_fit_follow_from_the_free_memory():
    # 16 maps of 1024² × 128 halves are 4.3 GB: four fifths of 24 GB hold four of them.
    bytes_per_view = 16 * 1024**2 * 128 * 2
    assert views_that_fit(24 * 10**9, bytes_per_view=bytes_per_view) == 4
    assert views_that_fit(0, bytes_per_view=bytes_per_view) == 1


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("KandiSuperRes.ckpt", 4),
        ("KandiSuperRes_x2.ckpt", 2),
        ("KandiSuperRes_flash_x2.pt", 2),
        ("mine_x4_ema.pt", 4),
        ("mine_x48.pt", 2),
        ("teacher.ckpt", 2),
    ],
)
def test_the_scale_is_read_off_the_released_names(name, scale):
    assert scale_of_released_file(name) == scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "scale=0.5 is no enlargement"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is not one of pil, np, pt"),
        ({"view_batch_size": 0}, "view_batch_size=0 is below 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        teacher(photo(), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1}, "scale=1 is not a whole number from 2 on"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not a whole number from 1 to 1000"),
        ({"window_px": 0}, "window_px=0 is not a whole number from 1 on"),
        ({"stride_px": 0}, "stride_px=0 is not a whole number from 1 to 1024"),
        ({"window_px": 32, "stride_px": 33}, "stride_px=33 is not a whole number from 1 to 32"),
    ],
)
def test_settings_that_cover_no_picture_are_refused(unet, settings, message):
    with pytest.raises(ValueError, match=message):
        KSRTeacherPipeline(unet, **settings)
