"""The teacher as a pipeline: five DPM-Solver steps, windows averaged after each."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ksr_distill.diffusion.few_step import NOISIEST_TIMESTEP
from ksr_distill.inference.enlarging import EnlargingPipeline, check_whole, num_passes
from ksr_distill.inference.pictures.images import Pictures
from ksr_distill.inference.teacher_pass import TeacherPass
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import TilePass, Tiling
from ksr_distill.models import KSRUNet


class KSRTeacherPipeline(EnlargingPipeline):
    """The undistilled model: slower than its student, and the measure of it.

    Pictures of any size and any scale ≥ 1, as in ``KSRFlashPipeline``; windows cover what is
    larger than one, and are averaged after every step (MultiDiffusion, arXiv:2302.08113).

    Args:
        sr: The teacher.
        scale: The factor it was trained for: 2 or 4.
        num_inference_steps: 5 in the released pipeline: t = 999, 799, 599, 400, 200.
        window_px: Side of a window in output pixels.
        stride_px: From one window to the next; the rest is overlap.
    """

    model_cpu_offload_seq = "sr"

    def __init__(
        self,
        sr: KSRUNet,
        scale: int = 2,
        num_inference_steps: int = 5,
        window_px: int = 1024,
        stride_px: int = 800,
    ) -> None:
        super().__init__()
        self.register_modules(sr=sr)
        self.register_settings(
            scale=scale,
            num_inference_steps=num_inference_steps,
            window_px=window_px,
            stride_px=stride_px,
        )

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuse a scale that is none, no steps, and windows that do not cover a picture.

        Raises:
            ValueError: If one is not allowed.
        """
        super().check_settings(settings)
        check_whole(settings, "num_inference_steps", lowest=1, highest=NOISIEST_TIMESTEP + 1)
        check_whole(settings, "window_px", lowest=1)
        check_whole(settings, "stride_px", lowest=1, highest=settings.get("window_px"))

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        scale: float | int | None = None,
        *,
        num_inference_steps: int | None = None,
        view_batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return the pictures enlarged.

        Args:
            image: As ``KSRFlashPipeline`` takes it.
            scale: Any number ≥ 1; the model's own by default.
            num_inference_steps: DPM-Solver steps; by default the folder's.
            view_batch_size: Windows denoised at once; by default what the free memory holds.
            generator: One for all pictures, or one each.
            output_type: ``pil`` (with the transparency of a PIL source), ``np`` or ``pt``.
        """
        return self._enlarge_all(
            image,
            scale,
            tiling=Tiling(self._default_tile_px()),
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            num_inference_steps=num_inference_steps,
            view_batch_size=view_batch_size,
        )

    def passes(
        self,
        scale: float | int,
        *,
        seed: int,
        num_inference_steps: int | None = None,
        view_batch_size: int | None = None,
    ) -> list[TilePass]:
        """Return the passes that reach or exceed the scale, for ``run_passes``."""
        self.check_scale(scale)
        if view_batch_size is not None and view_batch_size < 1:
            raise ValueError(f"view_batch_size={view_batch_size} is below 1")
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} is below 1")
        passes: list[TilePass] = [
            TeacherPass(
                denoise=self.sr,
                num_inference_steps=steps,
                noise=PlaceNoise(seed, stage),
                factor=config.scale,
                align=math.lcm(self.sr.stride, config.scale),
                device=self._execution_device,
                window_px=config.window_px,
                stride_px=config.stride_px,
                view_batch_size=view_batch_size,
            )
            for stage in range(num_passes(scale, config.scale))
        ]
        return passes


def scale_of_released_file(name: str) -> int:
    """Return what a file name says: 4 for ``…x4…`` and the bare ``KandiSuperRes.ckpt``, else 2."""
    stem = name.rsplit(".", 1)[0].lower()
    return 4 if re.search(r"x4(?!\d)", stem) or stem == "kandisuperres" else 2
