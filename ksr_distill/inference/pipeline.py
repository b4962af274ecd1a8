"""The pipeline: a model folder and a picture in, a larger picture out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import VQModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ksr_distill.diffusion import are_falling_timesteps
from ksr_distill.diffusion import student_timesteps as evenly_spread_timesteps
from ksr_distill.diffusion.few_step import FIRST_STUDENT_TIMESTEP, NOISIEST_TIMESTEP
from ksr_distill.inference.enlarging import EnlargingPipeline, StepCallback, num_passes
from ksr_distill.inference.pictures.images import Pictures
from ksr_distill.inference.refine import RefinerPass, refine_timesteps
from ksr_distill.inference.tiling.noise import PlaceNoise
from ksr_distill.inference.tiling.passes import SuperResolutionPass, TilePass, Tiling
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet
from ksr_distill.types import StepObserver

COLOUR_CELL_PX = 64
"""Side of the cells over which ``match_colours`` averages: one latent of the coarsest level."""


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for storing a network's tiles; bfloat16 would round to half levels."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


class KSRFlashPipeline(EnlargingPipeline):
    """Few-step super-resolution, with an optional refiner after each doubling.

    Pictures of any size and any scale ≥ 1: passes of the model's own scale until the size is
    reached or exceeded, the last one resized down; tiles where a pass is larger than one.

    Args:
        sr: The student.
        refiner: Kandinsky 3.0 Flash as an image refiner; optional.
        movq: The refiner's autoencoder; optional.
        context: The refiner's fixed prompt; optional.
        student_timesteps: The timesteps the student was trained for, noisiest first.
        scale: The factor the student was trained for.

    Raises:
        ValueError: If the timesteps do not fall within 0…999, or the scale is not allowed.
    """

    model_cpu_offload_seq = "sr->refiner->movq"
    # diffusers reads the class's lists. The context is one token, and nothing calls its forward.
    _optional_components = ["refiner", "movq", "context"]  # noqa: RUF012
    _exclude_from_cpu_offload = ["context"]  # noqa: RUF012

    def __init__(
        self,
        sr: KSRUNet,
        refiner: RefinerUNet | None = None,
        movq: VQModel | None = None,
        context: RefinerContext | None = None,
        student_timesteps: list[int] | tuple[int, ...] = (979, 729, 479, 229),
        scale: int = 2,
    ) -> None:
        super().__init__()
        self.register_modules(sr=sr, refiner=refiner, movq=movq, context=context)
        self.register_settings(scale=scale, student_timesteps=list(student_timesteps))

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuse a scale below 2, and timesteps that do not fall.

        Raises:
            ValueError: If one is not allowed.
        """
        super().check_settings(settings)
        timesteps = settings.get("student_timesteps", [FIRST_STUDENT_TIMESTEP])
        if not are_falling_timesteps(timesteps):
            raise ValueError(
                f"the model's student_timesteps={timesteps!r} are not whole numbers that fall "
                f"within {NOISIEST_TIMESTEP}…0; give those it was trained for, e.g. [979, 479]"
            )

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 - what a user may choose, all by keyword
        self,
        image: Pictures,
        scale: float | int | None = None,
        *,
        num_inference_steps: int | None = None,
        refine_steps: int = 0,
        match_colours: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        tile_px: int | None = None,
        overlap_px: int | None = None,
        tile_batch_size: int = 1,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("pred_x_0",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return the pictures enlarged.

        Args:
            image: A PIL image, which is turned as its EXIF says, an (H, W, C) array or a (3, h, w)
                tensor, a batch of them, or a list. uint8 and uint16 span their range, floats
                [0, 1].
            scale: Any number ≥ 1; the model's own by default.
            num_inference_steps: Spread over the schedule as in training; by default the
                timesteps that the folder names.
            refine_steps: 0, 1 or 2 steps of the refiner after each pass.
            match_colours: Give the refined picture the coarse colours of the one before, so that
                tiles and passes cannot drift. The released pipeline does not.
            generator: One for all pictures, or one each. A picture's noise depends on its
                generator alone, so a batch gives what single pictures give.
            tile_px: Largest side of a tile in output pixels of a pass; by default what fits into
                the free memory, up to 2048 on a GPU and 1280 on a CPU.
            overlap_px: Width of the blended borders, an eighth of the tile by default, at most
                48 px on a CPU.
            tile_batch_size: Tiles at once; changes the speed and the memory.
            output_type: ``pil`` (with a PIL source's transparency and RGB profile), ``np``
                ((b, H, W, 3) in [0, 1]) or ``pt`` ((b, 3, H, W) in [0, 1], on the CPU); lists
                where sizes differ.
            callback_on_step_end: Called with (pipeline, step, t, tensors) after each of the
                student's steps on each batch of tiles; may return {"pred_x_0": …} to replace it.
                diffusers' callback objects work, too.
            callback_on_step_end_tensor_inputs: Which of ``_callback_tensor_inputs`` it is shown.
        """
        self._num_timesteps = len(self._timesteps(num_inference_steps))
        if tile_px is None:
            tile_px = self._default_tile_px()
        return self._enlarge_all(
            image,
            scale,
            tiling=Tiling(tile_px, overlap_px, tile_batch_size),
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            num_inference_steps=num_inference_steps,
            refine_steps=refine_steps,
            match_colours=match_colours,
            on_step=self._observer(callback_on_step_end, callback_on_step_end_tensor_inputs),
        )

    def passes(
        self,
        scale: float | int,
        *,
        seed: int,
        num_inference_steps: int | None = None,
        refine_steps: int = 0,
        match_colours: bool = False,
        on_step: StepObserver | None = None,
    ) -> list[TilePass]:
        """Return the passes that reach or exceed the scale, for ``run_passes``."""
        self.check_scale(scale)
        self._check_refine_steps(refine_steps)
        timesteps = self._timesteps(num_inference_steps)
        passes: list[TilePass] = []
        for _ in range(num_passes(scale, self.config.scale)):
            passes.append(
                SuperResolutionPass(
                    denoise=self.sr,
                    timesteps=timesteps,
                    noise=PlaceNoise(seed, stage=len(passes)),
                    factor=self.config.scale,
                    align=math.lcm(self.sr.stride, self.config.scale),
                    device=self._execution_device,
                    dtype=stored_dtype(self.sr.dtype),
                    on_step=on_step,
                )
            )
            if refine_steps:
                passes.append(
                    RefinerPass(
                        refiner=self.refiner,
                        movq=self.movq,
                        context=self.context,
                        timesteps=refine_timesteps(refine_steps),
                        noise=PlaceNoise(seed, stage=len(passes)),
                        device=self._execution_device,
                        colour_cell_px=COLOUR_CELL_PX if match_colours else None,
                    )
                )
        return passes

    def _timesteps(self, num_inference_steps: int | None) -> Sequence[int]:
        if num_inference_steps is None:
            return self.config.student_timesteps
        return evenly_spread_timesteps(num_inference_steps)

    def _check_refine_steps(self, refine_steps: int) -> None:
        if refine_steps not in (0, 1, 2):
            raise ValueError(f"refine_steps={refine_steps} is not one of 0, 1, 2")
        if refine_steps and None in (self.refiner, self.movq, self.context):
            raise ValueError(
                f"refine_steps={refine_steps} needs a refiner, movq and context, which this model "
                "folder lacks; use refine_steps=0, or make the folder with ksr convert flash"
            )
