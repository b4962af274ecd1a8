"""The whole pipeline at full length against a chain made by hand of the parts with golden vectors.

The chain shares nothing with the pipeline but the networks: schedules come from the golden betas,
MoVQ is called by its layers, padding is torch's, and the noise is given from outside.
"""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from ksr_distill.inference import KSRTeacherPipeline
from ksr_distill.inference.tiling.noise import PlaceNoise
from tests.golden import load_golden
from tests.inference.whole import whole_pipeline

SR_TIMESTEPS = (979, 729, 479, 229)
REFINER_TIMESTEPS = {0: (), 1: (229,), 2: (479, 229)}
REFINER_ALIGN = 16  # px: MoVQ's 8, times the tiny refiner's one halving


@pytest.fixture(scope="module")
def pipeline():
    return whole_pipeline()


@pytest.fixture
def noise(monkeypatch):
    """Noise by (stage, draw): what a test puts in, else drawn when it is first asked for."""
    given = {}

    def draw(self, draw, window, *, channels=3, device="cpu"):
        assert (window.top, window.left) == (0, 0)
        shape = (channels, window.height, window.width)
        key = (self.stage, draw)
        if key not in given:
            generator = torch.Generator().manual_seed(100 * self.stage + draw)
            given[key] = torch.randn(shape, generator=generator)
        assert given[key].shape == shape
        return given[key]

    monkeypatch.setattr(PlaceNoise, "draw", draw)
    return given


def signal_and_noise(betas, timestep):
    alphas_cumprod = torch.cumprod(1 - load_golden("schedules")[0][betas].double(), dim=0)
    kept = float(alphas_cumprod[timestep])
    return kept**0.5, (1 - kept) ** 0.5


def padded(image, align):
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % align, 0, -height % align), mode="reflect")


@torch.no_grad()
def doubled_by_hand(pipeline, lowres, noise, stage):
    pred_x_0 = noise[stage, 0][None]
    for i, timestep in enumerate(SR_TIMESTEPS):
        a, s = signal_and_noise("linear_betas", timestep)
        x_t = a * pred_x_0 + s * noise[stage, i + 1][None]
        pred_x_0 = pipeline.sr(x_t, torch.tensor([timestep]), lowres)
    return pred_x_0.clamp(-1, 1)


@torch.no_grad()
def refined_by_hand(pipeline, picture, noise, stage, refine_steps):
    height, width = picture.shape[-2:]
    movq, tokens = pipeline.movq, pipeline.context.tokens
    latents = movq.quant_conv(movq.encoder(padded(picture, REFINER_ALIGN)))
    for i, timestep in enumerate(REFINER_TIMESTEPS[refine_steps]):
        a, s = signal_and_noise("cosine_betas", timestep)
        x_t = a * latents + s * noise[stage, i][None]
        eps = pipeline.refiner(x_t, torch.tensor([timestep]), tokens, torch.ones(1, 1)).sample
        latents = (x_t - s * eps) / a
    decoded = movq.decoder(movq.post_quant_conv(latents), latents)
    return decoded[..., :height, :width].clamp(-1, 1)


def enlarged_by_hand(pipeline, lowres, noise, *, doublings, refine_steps):
    """SR few steps → MoVQ encode → refine steps → decode, once for each doubling."""
    picture, stage = lowres, 0
    for _ in range(doublings):
        picture = doubled_by_hand(pipeline, picture, noise, stage)
        stage += 1
        if refine_steps:
            picture = refined_by_hand(pipeline, picture, noise, stage, refine_steps)
            stage += 1
    return (picture + 1) / 2


@pytest.mark.parametrize(
    ("size", "doublings", "refine_steps"),
    [((16, 24), 1, 0), ((16, 24), 1, 1), ((16, 24), 1, 2), ((19, 13), 1, 0), ((19, 13), 1, 2),
     ((10, 12), 2, 0), ((10, 12), 2, 1)],
)  # fmt: skip
def test_the_pipeline_is_the_chain(pipeline, noise, size, doublings, refine_steps):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(4))

    result = pipeline(image, scale=2**doublings, refine_steps=refine_steps, output_type="pt").images

    expected = enlarged_by_hand(
        pipeline, image * 2 - 1, noise, doublings=doublings, refine_steps=refine_steps
    )
    assert len(noise) == doublings * (1 + len(SR_TIMESTEPS) + refine_steps)
    # The refiner of random weights makes a rounding error (the chain's factors are doubles) larger.
    tolerance = 5e-4 if refine_steps else 1e-5
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


@pytest.fixture
def golden_sampling(noise):
    golden, _ = load_golden("flash_sampling")
    noise[0, 0] = golden["start"][0]
    for i in range(4):
        noise[0, i + 1] = golden[f"noise.{i}"][0]
    low, high = golden["lowres"].min(), golden["lowres"].max()
    assert -1 <= low < high <= 1  # a picture: the pipeline takes it as one
    return golden


def test_without_a_refiner_it_gives_the_released_sampling(pipeline, golden_sampling):
    image = (golden_sampling["lowres"] + 1) / 2
    result = pipeline(image, output_type="pt").images
    expected = (golden_sampling["out"].clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("refine_steps", [1, 2])
def test_the_refiner_goes_on_from_the_released_sampling(
    pipeline, noise, golden_sampling, refine_steps
):
    image = (golden_sampling["lowres"] + 1) / 2
    result = pipeline(image, refine_steps=refine_steps, output_type="pt").images
    sharp = golden_sampling["out"].clamp(-1, 1)
    expected = (refined_by_hand(pipeline, sharp, noise, 1, refine_steps) + 1) / 2
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)
    assert (result - (sharp + 1) / 2).abs().mean() > 0.01  # and the refiner does something


@pytest.mark.parametrize(
    ("name", "window_px", "stride_px"),
    [("teacher_sampling_one_view", 1024, 800), ("teacher_sampling_views", 32, 24)],
)
def test_the_teacher_gives_the_released_sampling(pipeline, noise, name, window_px, stride_px):
    golden, _ = load_golden(name)
    noise[0, 0] = golden["start"][0]
    teacher = KSRTeacherPipeline(pipeline.sr, window_px=window_px, stride_px=stride_px)
    teacher.set_progress_bar_config(disable=True)
    result = teacher((golden["lowres"] + 1) / 2, output_type="pt").images
    expected = (golden["out"].clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_the_last_stage_is_the_picture_that_is_returned(pipeline):
    image = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    )
    pil, unit = (
        pipeline(
            image, refine_steps=1, generator=torch.Generator().manual_seed(2), output_type=kind
        ).images
        for kind in ("pil", "pt")
    )
    as_pixels = (unit[0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(pil[0]), as_pixels)
