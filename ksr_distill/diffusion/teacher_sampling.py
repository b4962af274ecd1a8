"""The teacher's samplers: DPM-Solver++ in windows as released, and DDIM as many-step reference."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from ksr_distill.diffusion.few_step import FIRST_STUDENT_TIMESTEP
from ksr_distill.diffusion.schedule import NoiseSchedule
from ksr_distill.types import Denoiser

View = tuple[int, int, int, int]
"""A window (top, bottom, left, right) in pixels of the output."""


def window_views(height: int, width: int, *, window_px: int, stride_px: int) -> list[View]:
    """Return windows that cover the picture, row by row; the last of each row ends at its edge.

    MultiDiffusion's F_i (arXiv:2302.08113, eq. 7). A side shorter than the window is one window.
    """

    def spans(length: int) -> list[tuple[int, int]]:
        if length <= window_px:
            return [(0, length)]
        count = math.ceil((length - window_px) / stride_px) + 1
        starts = [min(i * stride_px, length - window_px) for i in range(count)]
        return [(start, start + window_px) for start in starts]

    return [(*rows, *columns) for rows in spans(height) for columns in spans(width)]


@torch.no_grad()
def sample_teacher(
    denoise: Denoiser,
    lowres: Float[Tensor, "b 3 h w"],
    *,
    start: Float[Tensor, "b 3 H W"],
    num_inference_steps: int = 5,
    window_px: int = 1024,
    stride_px: int = 800,
    view_batch_size: int = 15,
) -> Float[Tensor, "b 3 H W"]:
    """Return the teacher's sample: DPM-Solver++ (2M), windows averaged after every step.

    Each step denoises every window with a solver of its own, which keeps that window's previous
    estimate, and averages the overlaps (MultiDiffusion, arXiv:2302.08113, eq. 5). Five steps are
    t = 999, 799, 599, 400, 200 (the released sampler).

    Args:
        lowres: Resized bilinearly to the output before it is cut into windows.
        start: Noise from N(0, I) at the output's size.
        view_batch_size: Windows denoised at once. Bounds the memory, does not change the result.
    """
    batch = start.shape[0]
    views = window_views(*start.shape[-2:], window_px=window_px, stride_px=stride_px)
    view_batches = [views[i : i + view_batch_size] for i in range(0, len(views), view_batch_size)]
    solver = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="sample")
    solver.set_timesteps(num_inference_steps)
    solvers = [copy.deepcopy(solver) for _ in view_batches]
    upsampled = F.interpolate(lowres, start.shape[-2:], mode="bilinear")
    sample = start
    for timestep in solver.timesteps:
        total, count = torch.zeros_like(sample), torch.zeros_like(sample[:1, :1])
        for view_batch, view_solver in zip(view_batches, solvers, strict=True):
            x_t = _cut(sample, view_batch)
            t = torch.full((x_t.shape[0],), int(timestep), device=x_t.device)
            pred_x_0 = denoise(x_t, t, _cut(upsampled, view_batch)).float()
            stepped = view_solver.step(pred_x_0, timestep, x_t).prev_sample
            for view, window in zip(view_batch, stepped.split(batch), strict=True):
                total[_slices(view)] += window
                count[_slices(view)] += 1
        sample = total / count
    return sample


@torch.no_grad()
def sample_teacher_ddim(
    denoise: Denoiser,
    lowres: Float[Tensor, "b 3 h w"],
    *,
    start: Float[Tensor, "b 3 H W"],
    num_inference_steps: int,
) -> Float[Tensor, "b 3 H W"]:
    """Return a deterministic DDIM sample (arXiv:2010.02502, eq. 12 with σ = 0), without a clamp.

    The reference for "the teacher in many steps": timesteps fall evenly from 979; one step is the
    one-step estimate at 979.

    Args:
        start: Noise from N(0, I) at the output's size.
    """
    first = FIRST_STUDENT_TIMESTEP
    timesteps = [first - i * (first + 1) // num_inference_steps for i in range(num_inference_steps)]
    alphas_cumprod = NoiseSchedule("linear").alphas_cumprod
    sample = start
    for timestep, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t = torch.full((start.shape[0],), timestep, device=start.device)
        pred_x_0 = denoise(sample, t, lowres).float()
        sample = _ddim_step(alphas_cumprod, sample, pred_x_0, timestep, following)
    return sample


def _ddim_step(
    alphas_cumprod: Tensor, x_t: Tensor, pred_x_0: Tensor, timestep: int, following: int
) -> Tensor:
    """Return x at the following timestep (-1: the estimate itself)."""
    if following < 0:
        return pred_x_0
    alpha, alpha_following = (float(alphas_cumprod[i]) for i in (timestep, following))
    eps = (x_t - math.sqrt(alpha) * pred_x_0) / math.sqrt(1 - alpha)
    return math.sqrt(alpha_following) * pred_x_0 + math.sqrt(1 - alpha_following) * eps


def _slices(view: View) -> tuple[slice, slice, slice, slice]:
    top, bottom, left, right = view
    return (slice(None), slice(None), slice(top, bottom), slice(left, right))


def _cut(image: Tensor, views: Sequence[View]) -> Tensor:
    """Return the windows concatenated along the batch: (views · b, c, h, w)."""
    return torch.cat([image[_slices(view)] for view in views])
