"""The schedules against the released tables and against hand-worked numbers."""

import pytest
import torch

from ksr_distill.diffusion import NoiseSchedule, are_falling_timesteps, student_timesteps
from tests.golden import load_golden


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_betas_are_the_released_ones(kind):
    tensors, _ = load_golden("schedules")
    expected = tensors[f"{kind}_betas"]
    assert torch.allclose(NoiseSchedule(kind).betas.float(), expected, rtol=1e-5, atol=1e-7)


def test_signal_at_the_students_timesteps_is_as_published():
    signal = NoiseSchedule().signal(torch.tensor([979, 729, 479, 229])).flatten()
    assert torch.allclose(signal, torch.tensor([0.00776, 0.06721, 0.30951, 0.76016]), atol=5e-6)


def test_add_noise_keeps_unit_variance():
    schedule, t = NoiseSchedule(), torch.tensor([0, 500, 999])
    total = schedule.signal(t) ** 2 + schedule.noise(t) ** 2
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_add_noise_on_a_hand_worked_pixel():
    x_0, eps = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), -1.0)
    x_t = NoiseSchedule().add_noise(x_0, eps, torch.tensor([0]))  # ᾱ_0 = 1 - 1e-4
    assert x_t[0, 0].item() == pytest.approx(0.5 * 0.9999**0.5 - 1e-4**0.5, abs=1e-7)


def test_critic_range_of_log_snr_is_timesteps_11_to_456():
    t = NoiseSchedule().timestep_of_log_snr(torch.tensor([6.0, -2.0]))
    assert t.tolist() == [11, 456]


def test_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="'sigmoid' is no noise schedule; use linear or cosine"):
        NoiseSchedule("sigmoid")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, (979,)), (2, (979, 479)), (4, (979, 729, 479, 229)),
     (8, (979, 854, 729, 604, 479, 354, 229, 104))],
)  # fmt: skip
def test_student_timesteps_follow_the_released_four(steps, expected):
    assert student_timesteps(steps) == expected


@pytest.mark.parametrize("timesteps", [[979, 729, 479, 229], (979,), [999, 0]])
def test_whole_numbers_that_fall_can_be_sampled(timesteps):
    assert are_falling_timesteps(timesteps)


@pytest.mark.parametrize(
    "timesteps",
    [[], None, {}, 979, "979", [979, "x"], [979.5, 2], [979, True], [1000], [229, 979], [979, 979],
     [979, -1]],
)  # fmt: skip
def test_what_does_not_fall_within_the_schedule_cannot(timesteps):
    assert not are_falling_timesteps(timesteps)


def test_the_most_steps_still_end_within_the_schedule():
    assert are_falling_timesteps(student_timesteps(49))


@pytest.mark.parametrize("steps", [0, 50])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps="):
        student_timesteps(steps)
