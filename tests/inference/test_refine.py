import pytest
import torch

from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.refine import (
    RefinerPass,
    decode_in_tiles,
    encode_in_tiles,
    match_low_frequencies,
    refine_latents,
    refine_timesteps,
)
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.models import RefinerContext
from ksr_distill.models.movq import decode, encode
from ksr_distill.models.weights import movq_from_released, refiner_from_released
from tests.golden import golden_shapes, golden_weights, load_golden


@pytest.fixture(scope="module")
def refiner():
    return refiner_from_released(golden_weights(golden_shapes("tiny_state_dicts/refiner_unet")))


@pytest.fixture(scope="module")
def movq():
    return movq_from_released(golden_weights(golden_shapes("tiny_state_dicts/movq")))


@pytest.fixture(scope="module")
def context():
    model = RefinerContext(dim=64)
    torch.nn.init.normal_(model.tokens, generator=torch.Generator().manual_seed(0))
    return model


def refiner_pass(refiner, movq, context, **options):
    options = {"timesteps": (229,), "noise": PlaceNoise(seed=1, stage=1)} | options
    return RefinerPass(refiner, movq, context, device=torch.device("cpu"), **options)


def picture(height, width, seed=0):
    smooth = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic").clamp(-1, 1)


def test_the_timesteps_are_the_released_ones():
    assert [refine_timesteps(n) for n in (0, 1, 2)] == [(), (229,), (479, 229)]
    with pytest.raises(ValueError, match="refine_steps=3 is not one of 0, 1, 2"):
        refine_timesteps(3)


def test_one_step_equals_the_released_code(refiner):
    golden, _ = load_golden("refine_step")

    refined = refine_latents(
        refiner,
        golden["latents"],
        tokens=golden["context"],
        mask=golden["context_mask"],
        timesteps=(229,),
        draw_noise=lambda draw: golden["noise"],
    )

    assert (refined - golden["out"]).abs().max() < 1e-4  # a U-Net's float32; a_229 = .93


def test_the_arithmetic_of_two_steps_by_hand(context):
    always_half = refiner_from_released(
        golden_weights(golden_shapes("tiny_state_dicts/refiner_unet"))
        | {
            "out_layer.2.weight": torch.zeros(4, 32, 3, 3),
            "out_layer.2.bias": torch.full((4,), 0.5),
        }
    )
    added = (0.5, 1.5)

    refined = refine_latents(
        always_half,
        torch.full((1, 4, 8, 8), 2.0),
        tokens=context.tokens,
        timesteps=(479, 229),
        draw_noise=lambda draw: torch.full((1, 4, 8, 8), added[draw]),
    )

    # Step 1 takes away the very noise that it added. Step 2 adds 1.5 and takes away 0.5, which
    # leaves z + s/a, and the cosine schedule has ᾱ_229 = 0.869.
    expected = 2 + (0.131 / 0.869) ** 0.5
    assert torch.allclose(refined, torch.full_like(refined, expected), atol=1e-3)


def test_the_pass_is_the_chain_of_its_parts(refiner, movq, context):
    image, window = picture(64, 96), Window(128, 64, 64, 96)
    noise = PlaceNoise(seed=1, stage=1)

    refined = refiner_pass(refiner, movq, context)(image, [window])

    own_noise = noise.draw(0, Window(16, 8, 8, 12), channels=4)[None]
    chained = refine_latents(
        refiner,
        encode(movq, image),
        tokens=context.tokens,
        timesteps=(229,),
        draw_noise=lambda draw: own_noise,
    )
    assert torch.equal(refined, decode(movq, chained))


def test_a_batch_gives_what_single_tiles_give(refiner, movq, context):
    images = torch.cat([picture(64, 64, seed) for seed in (0, 1)])
    windows = [Window(0, 0, 64, 64), Window(0, 64, 64, 64)]
    run = refiner_pass(refiner, movq, context)

    together = run(images, windows)

    assert torch.equal(together[1:], run(images[1:], windows[1:]))


def test_weights_of_another_dtype_are_fed_their_own(refiner, movq, context):
    half = refiner_from_released(
        {
            name: value.to(torch.bfloat16)
            for name, value in golden_weights(
                golden_shapes("tiny_state_dicts/refiner_unet")
            ).items()
        }
    )

    refined = refiner_pass(half, movq, context)(picture(64, 64), [Window(0, 0, 64, 64)])

    assert refined.dtype == torch.float32
    assert torch.isfinite(refined).all()


def small_tiles(monkeypatch, overlap_px):
    monkeypatch.setattr("ksr_distill.inference.refine.MOVQ_TILE_PX", 160)
    monkeypatch.setattr("ksr_distill.inference.refine.MOVQ_OVERLAP_PX", overlap_px)


def test_tiles_of_a_codec_that_sees_single_latents_equal_the_whole(movq, monkeypatch):
    def encode_alone(movq, image):
        return torch.nn.functional.avg_pool2d(image, 8)

    def decode_alone(movq, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=8.0)

    monkeypatch.setattr("ksr_distill.inference.refine.encode", encode_alone)
    monkeypatch.setattr("ksr_distill.inference.refine.decode", decode_alone)
    small_tiles(monkeypatch, overlap_px=32)
    image = picture(200, 424)

    latents = encode_in_tiles(movq, image)
    decoded = decode_in_tiles(movq, latents)

    assert torch.allclose(latents, encode_alone(movq, image), atol=1e-6)
    assert torch.allclose(decoded, decode_alone(movq, latents), atol=1e-6)


def test_blending_hides_the_border_of_movq_tiles(movq, monkeypatch):
    def jump_at_the_border(overlap_px):
        small_tiles(monkeypatch, overlap_px)
        decoded = decode_in_tiles(movq, latents)
        steps = (decoded[..., 1:] - decoded[..., :-1]).abs().mean(dim=(0, 1, 2))
        return steps[159] / steps.mean()

    latents = encode(movq, picture(64, 320))

    assert jump_at_the_border(overlap_px=0) > 1.5
    assert jump_at_the_border(overlap_px=40) < 1.5


def test_the_colour_match_moves_colours_and_keeps_detail():
    reference = picture(64, 64)
    checkerboard = 0.1 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2 - 1)
    drifted = reference + checkerboard + 0.3

    matched = match_low_frequencies(drifted, reference, cell_px=16)

    assert torch.allclose(matched, reference + checkerboard, atol=1e-5)
