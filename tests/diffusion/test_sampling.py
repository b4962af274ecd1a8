"""Both samplers against recordings of the released code, and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from ksr_distill.diffusion import (
    NoiseSchedule,
    noise_from,
    sample_few_steps,
    sample_teacher,
    sample_teacher_ddim,
    student_timesteps,
    window_views,
)
from ksr_distill.models.weights import sr_unet_from_released
from tests.golden import golden_shapes, golden_weights, load_golden


@pytest.fixture(scope="module")
def unet():
    return sr_unet_from_released(golden_weights(golden_shapes("tiny_state_dicts/sr_unet"))).eval()


@torch.no_grad()
def test_few_steps_agree_with_the_released_student(unet):
    recorded, _ = load_golden("flash_sampling")
    noise = [recorded["start"], *(recorded[f"noise.{i}"] for i in range(4))]
    image = sample_few_steps(
        unet, recorded["lowres"], timesteps=student_timesteps(4), schedule=NoiseSchedule(),
        draw_noise=lambda draw: noise[draw],
    )  # fmt: skip
    assert (image - recorded["out"]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_windows_agree_with_the_released_teacher_whatever_the_batch_of_views(unet, batch):
    recorded, _ = load_golden("teacher_sampling_views")
    image = sample_teacher(unet, recorded["lowres"], start=recorded["start"], window_px=32,
                           stride_px=24, view_batch_size=batch)  # fmt: skip
    assert (image - recorded["out"]).abs().max() < 1e-5


@torch.no_grad()
def test_one_window_agrees_with_the_released_teacher(unet):
    recorded, _ = load_golden("teacher_sampling_one_view")
    image = sample_teacher(unet, recorded["lowres"], start=recorded["start"])
    assert (image - recorded["out"]).abs().max() < 1e-5


def test_windows_are_the_released_ones():
    recorded, _ = load_golden("teacher_sampling_views")
    expected = [tuple(view) for view in recorded["views"].int().tolist()]
    ours = [(t, b, left, r) for t, b, left, r in window_views(48, 80, window_px=32, stride_px=24)]
    assert ours == expected


@torch.no_grad()
def test_few_steps_equal_diffusers_lcm_scheduler(unet):
    lowres, shape = torch.rand(1, 3, 8, 8) * 2 - 1, (1, 3, 16, 16)
    noise = [torch.randn(shape) for _ in range(5)]
    scheduler = LCMScheduler(
        prediction_type="sample", beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
        clip_sample=False, original_inference_steps=100, timestep_scaling=1e6,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=list(student_timesteps(4)))
    x_t = scheduler.add_noise(noise[0], noise[1], torch.tensor([979]))
    for i, t in enumerate(scheduler.timesteps):
        denoised = unet(x_t, t[None], lowres)
        if i < 3:
            following = scheduler.timesteps[i + 1]
            x_t = scheduler.add_noise(denoised, noise[i + 2], following[None])
    ours = sample_few_steps(unet, lowres, timesteps=student_timesteps(4),
                            schedule=NoiseSchedule(), draw_noise=lambda i: noise[i])  # fmt: skip
    assert (ours - denoised).abs().max() < 1e-5


@torch.no_grad()
def test_ddim_equals_diffusers_on_the_same_timesteps(unet):
    lowres, start = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 3, 16, 16)
    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="sample",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=19,
    )  # fmt: skip
    scheduler.set_timesteps(50)  # 999, 979, …, 19: twenty apart, as 49 steps from 979 are
    ours = sample_teacher_ddim(unet, lowres, start=start, num_inference_steps=49)
    x_t = start
    for t in scheduler.timesteps[1:]:
        x_t = scheduler.step(unet(x_t, t[None], lowres), t, x_t).prev_sample
    assert scheduler.timesteps[1] == 979
    assert (ours - x_t).abs().max() < 1e-4


def test_a_generators_noise_is_given_once_and_in_order():
    draw_noise = noise_from(torch.Generator().manual_seed(0), (1, 3, 4, 4), device="cpu")
    assert not torch.equal(draw_noise(0), draw_noise(1))
    with pytest.raises(ValueError, match="draw 0 was asked of a generator whose next one is 2"):
        draw_noise(0)


def test_on_step_is_told_every_step_in_order(unet):
    seen = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sample_few_steps(
            unet, torch.zeros(1, 3, 8, 8), timesteps=(979, 479), schedule=NoiseSchedule(),
            draw_noise=noise_from(generator, (1, 3, 16, 16), device="cpu"),
            on_step=lambda i, t, image: seen.append((i, t, tuple(image.shape))),
        )  # fmt: skip
    assert seen == [(0, 979, (1, 3, 16, 16)), (1, 479, (1, 3, 16, 16))]
