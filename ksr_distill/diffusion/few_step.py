"""The few-step sampling loop of roll-outs, previews, evaluation and the pipeline alike."""

from collections.abc import Sequence
from itertools import count, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.diffusion.schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from ksr_distill.types import Denoiser, NoiseSource, StepObserver

FIRST_STUDENT_TIMESTEP = 979
"""Where the released student starts (KandiSuperRes, ``diffusion_sr_turbo``)."""

NOISIEST_TIMESTEP = NUM_TRAIN_TIMESTEPS - 1

MOST_STUDENT_STEPS = 49
"""With more, the last timestep would be below 0."""


def student_timesteps(num_inference_steps: int) -> tuple[int, ...]:
    """Return t_i = 979 - ⌊i·1000/n⌋; for n = 4 the released (979, 729, 479, 229)."""
    if not 1 <= num_inference_steps <= MOST_STUDENT_STEPS:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is outside 1…{MOST_STUDENT_STEPS}; "
            "students are trained for 1, 2, 4 or 8"
        )
    return tuple(
        FIRST_STUDENT_TIMESTEP - i * 1000 // num_inference_steps for i in range(num_inference_steps)
    )


def are_falling_timesteps(timesteps: object) -> bool:
    """Return whether these are strictly falling integers within 0…999."""
    return (
        isinstance(timesteps, Sequence)
        and len(timesteps) > 0
        and all(type(t) is int and 0 <= t <= NOISIEST_TIMESTEP for t in timesteps)
        and all(earlier > later for earlier, later in pairwise(timesteps))
    )


def normal_noise(
    generator: torch.Generator, shape: Sequence[int], *, device: torch.device | str
) -> Float[Tensor, "b c H W"]:
    """Return N(0, 1) noise, drawn on the generator's device and moved to the one given.

    The shape is explicit because ``randn_like`` follows the memory format: the same seed would give
    different noise under channels_last.
    """
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)


def noise_from(
    generator: torch.Generator, shape: Sequence[int], *, device: torch.device | str
) -> NoiseSource:
    """Return a generator's draws as the noise of one sampling run.

    A generator cannot go back, so draws 0, 1, 2, … are given once each and in this order.
    """
    next_draw = count()

    def draw_noise(draw: int) -> Tensor:
        expected = next(next_draw)
        if draw != expected:
            raise ValueError(
                f"draw {draw} was asked of a generator whose next one is {expected}; ask in order, "
                "or make a new source with noise_from"
            )
        return normal_noise(generator, shape, device=device)

    return draw_noise


def sample_few_steps(
    denoise: Denoiser,
    lowres: Float[Tensor, "b 3 h w"],
    *,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    draw_noise: NoiseSource,
    on_step: StepObserver | None = None,
) -> Float[Tensor, "b 3 H W"]:
    """Return pred_x_0 after the last of a few steps: re-noise, estimate, repeat.

    x̂ ← N(0, I); for each t: x_t = a_t·x̂ + s_t·ε with fresh ε, x̂ = G(x_t, t, lowres). There is no
    clamp between the steps (KandiSuperRes, ``diffusion_sr_turbo``).

    Args:
        draw_noise: Draw 0 is the start, draw i + 1 is the noise of step i; its shape is the
            output's.
        on_step: Sees each step, and may replace its pred_x_0.
    """
    pred_x_0 = draw_noise(0)
    for i, timestep in enumerate(timesteps):
        t = torch.full((pred_x_0.shape[0],), timestep, device=pred_x_0.device)
        x_t = schedule.add_noise(pred_x_0, draw_noise(i + 1), t)
        pred_x_0 = denoise(x_t, t, lowres).float()
        replaced = None if on_step is None else on_step(i, timestep, pred_x_0)
        pred_x_0 = pred_x_0 if replaced is None else replaced
    return pred_x_0
