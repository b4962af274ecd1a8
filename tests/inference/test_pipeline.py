import json

import numpy as np
import PIL.Image
import pytest
import torch

from ksr_distill.diffusion import NoiseSchedule, sample_few_steps
from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.inference.enlarging import draw_seeds, num_passes
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.tiling.noise import PlaceNoise
from tests.inference.conftest import make_unet

RNG = np.random.default_rng(0)
SMALL = PIL.Image.fromarray(RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8))
OTHER = PIL.Image.fromarray(RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def pixels(pipeline, image=SMALL, **options):
    options = {"generator": seeded(), "output_type": "pt"} | options
    return pipeline(image, **options).images


def test_the_pipeline_is_the_one_few_step_loop_with_the_places_noise(pipeline, unet):
    lowres = torch.from_numpy(np.asarray(SMALL)).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = PlaceNoise(draw_seeds(seeded(), 1)[0], stage=0)
    with torch.no_grad():
        expected = sample_few_steps(
            unet,
            lowres,
            timesteps=(979, 729, 479, 229),
            schedule=NoiseSchedule("linear"),
            draw_noise=noise.source([Window(0, 0, 40, 56)]),
        )
    torch.testing.assert_close(pixels(pipeline), (expected.clamp(-1, 1) + 1) / 2)


def test_without_a_generator_torchs_own_decides(pipeline):
    torch.manual_seed(3)
    first = pixels(pipeline, generator=None)
    torch.manual_seed(3)
    assert torch.equal(pixels(pipeline, generator=None), first)


def test_one_generator_gives_each_picture_its_own_noise(pipeline):
    first, second = pixels(pipeline, [SMALL, SMALL])
    assert not torch.equal(first, second)


def test_generators_must_be_as_many_as_pictures(pipeline):
    with pytest.raises(ValueError, match="list of 1 for 2 pictures"):
        pixels(pipeline, [SMALL, OTHER], generator=[seeded()])


def test_the_folder_names_public_modules_and_no_absent_component(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "KSRFlashPipeline"
    assert index["sr"] == ["ksr_distill.models", "KSRUNet"]
    assert index["refiner"] == index["movq"] == index["context"] == [None, None]
    assert index["student_timesteps"] == [979, 729, 479, 229]
    assert index["scale"] == 2


def test_a_replaced_component_keeps_its_public_module(pipeline):
    pipeline.sr = make_unet(seed=1)
    assert tuple(pipeline.config["sr"]) == ("ksr_distill.models", "KSRUNet")


def test_refining_without_a_refiner_says_what_is_missing(pipeline):
    with pytest.raises(ValueError, match=r"refine_steps=1 needs a refiner, movq and context"):
        pixels(pipeline, refine_steps=1)


def test_every_holder_of_a_picture_gives_the_same(pipeline):
    array = np.asarray(SMALL)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = pixels(pipeline)
    for image in (array, array[None], tensor, tensor[None], tensor / 255, array / 255.0, [array]):
        torch.testing.assert_close(pixels(pipeline, image), expected, atol=1e-5, rtol=0)


def test_sixteen_bit_grey_keeps_its_bits(pipeline):
    values = np.linspace(0, 65535, 20 * 28).reshape(20, 28).astype(np.uint16)
    grey = values[:, :, None].repeat(3, axis=2)
    assert torch.equal(pixels(pipeline, PIL.Image.fromarray(values)), pixels(pipeline, grey))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "an empty list"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\)"),
        (torch.full((3, 8, 8), -0.5), r"-0.5….*floats must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"floats must lie in \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        pixels(pipeline, image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "scale=0.5 is no enlargement"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"refine_steps": 3}, "refine_steps=3 is not one of 0, 1, 2"),
        ({"output_type": "latent"}, "output_type='latent' is not one of pil, np, pt"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pixels(pipeline, **options)


@pytest.mark.parametrize(
    "timesteps", [[], [5000, 1], [1000], [229, 979], [979, 979], [979, -1], [979, True]]
)
def test_timesteps_that_cannot_be_sampled_in_turn_are_refused(unet, timesteps):
    with pytest.raises(
        ValueError, match=r"student_timesteps=\[.*\] are not whole numbers that fall"
    ):
        KSRFlashPipeline(unet, student_timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [(979, 729, 479, 229), [999, 0], [979]])
def test_timesteps_that_training_allows_are_kept(unet, timesteps):
    assert KSRFlashPipeline(unet, student_timesteps=timesteps).config.student_timesteps == [
        *timesteps
    ]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((1, 1), 2, (2, 2)),
        ((13, 9), 2, (26, 18)),
        ((7, 5), 4, (28, 20)),
        ((10, 6), 3, (30, 18)),
        ((10, 6), 1, (10, 6)),
        ((200, 1), 2.5, (500, 2)),
    ],
)
def test_any_size_and_scale(pipeline, size, scale, expected):
    image = SMALL.resize(size)
    assert pixels(pipeline, image, scale=scale, output_type="pil")[0].size == expected


def test_passes_reach_the_scale():
    assert [num_passes(s, 2) for s in (1, 2, 2.1, 4, 16)] == [1, 1, 2, 2, 4]
    assert [num_passes(s, 4) for s in (2, 4, 16)] == [1, 1, 2]


def test_four_is_two_doublings(pipeline):
    stages = [tile_pass.stage for tile_pass in pipeline.passes(4, seed=0)]
    assert stages == [0, 1]
    assert all(p.factor == 2 for p in pipeline.passes(4, seed=0))


def test_the_number_of_steps_is_the_users(pipeline):
    seen = []
    for steps, expected in ((None, [979, 729, 479, 229]), (1, [979]), (2, [979, 479])):
        seen.clear()
        pixels(
            pipeline,
            num_inference_steps=steps,
            callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(t),
        )
        assert seen == expected


def test_transparency_is_enlarged_beside_the_colours(pipeline):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (230, 200, 40, 255)  # black hides under the transparent half
    (big,) = pixels(pipeline, PIL.Image.fromarray(rgba), output_type="pil")
    assert (big.mode, big.size) == ("RGBA", (32, 32))
    assert np.asarray(big)[:, :12, 3].min() == 255
    assert np.asarray(big)[:, 20:, 3].max() == 0
    opaque = PIL.Image.new("RGB", (16, 16), (230, 200, 40))
    (expected,) = pixels(pipeline, opaque, output_type="pil")
    assert np.abs(np.asarray(big)[:, :, :3].astype(int) - np.asarray(expected)).max() <= 1
