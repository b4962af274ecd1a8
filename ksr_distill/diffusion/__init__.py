"""Noise schedules, and the samplers of student and teacher."""

from ksr_distill.diffusion.few_step import (
    FIRST_STUDENT_TIMESTEP,
    are_falling_timesteps,
    noise_from,
    normal_noise,
    sample_few_steps,
    student_timesteps,
)
from ksr_distill.diffusion.schedule import NoiseSchedule
from ksr_distill.diffusion.teacher_sampling import sample_teacher, sample_teacher_ddim, window_views

__all__ = [
    "FIRST_STUDENT_TIMESTEP",
    "NoiseSchedule",
    "are_falling_timesteps",
    "noise_from",
    "normal_noise",
    "sample_few_steps",
    "sample_teacher",
    "sample_teacher_ddim",
    "student_timesteps",
    "window_views",
]
