"""The teacher as a pipeline: five DPM-Solver steps, windows averaged after each."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from jaxtyping import Float
from torch import Tensor

from ksr_distill.diffusion import sample_teacher, window_views
from ksr_distill.inference.images import Pictures, as_rasters, from_rasters
from ksr_distill.inference.noise import PlaceNoise, Window
from ksr_distill.inference.passes import is_out_of_memory
from ksr_distill.inference.pipeline import (
    align_weights,
    draw_seeds,
    num_passes,
    own_classes,
    public_path,
    resized,
)
from ksr_distill.inference.rasters import Raster, TensorRaster, read_reflected
from ksr_distill.models import KSRUNet

logger = logging.getLogger(__name__)

FEATURE_MAPS_AT_ONCE = 16
"""Memory of one view, in feature maps of the first level. The released pipeline's peak at 2048²
is 17.7 GB, weights and all (one H200): 16.5 such maps of 128 channels in half precision."""

SHARE_OF_FREE_MEMORY = 0.8


class KSRTeacherPipeline(DiffusionPipeline):
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
        align_weights(sr)
        self.register_modules(sr=sr)
        self.register_to_config(
            scale=scale,
            num_inference_steps=num_inference_steps,
            window_px=window_px,
            stride_px=stride_px,
        )

    def register_to_config(self, **kwargs: object) -> None:
        """Record our classes by the room they are imported from: that path is public for good."""
        super().register_to_config(**{name: public_path(value) for name, value in kwargs.items()})

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return model_index.json, with this package's classes where a folder brings its own."""
        return own_classes(cast(dict[str, Any], super().load_config(*args, **kwargs)))

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
            output_type: ``pil``, ``np`` or ``pt``.
        """
        scale = self.config.scale if scale is None else scale
        if not (scale >= 1 and math.isfinite(scale)):
            raise ValueError(f"scale={scale} is no enlargement; use any number ≥ 1")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not one of pil, np, pt")
        if view_batch_size is not None and view_batch_size < 1:
            raise ValueError(f"view_batch_size={view_batch_size} is below 1")
        steps = num_inference_steps or self.config.num_inference_steps
        sources = as_rasters(image)
        results = []
        for source, seed in zip(sources, draw_seeds(generator, len(sources)), strict=True):
            enlarged: Raster = source
            for stage in range(num_passes(scale, self.config.scale)):
                noise = PlaceNoise(seed, stage)
                enlarged = self._enlarge_once(enlarged, noise, steps, view_batch_size)
            results.append(resized(enlarged, source, scale))
        images: Any = from_rasters(results, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _enlarge_once(
        self, source: Raster, noise: PlaceNoise, num_inference_steps: int, batch: int | None
    ) -> TensorRaster:
        """Return the raster enlarged by the model's own factor, in memory."""
        factor, device = self.config.scale, self._execution_device
        align = math.lcm(self.sr.stride, factor)
        height, width = (
            math.ceil(side * factor / align) * align for side in (source.height, source.width)
        )
        lowres = read_reflected(source, Window(0, 0, height // factor, width // factor))
        start = noise.draw(0, Window(0, 0, height, width), device=device)
        sample = self._sample(lowres[None].to(device), start[None], num_inference_steps, batch)
        pixels = sample[0, :, : source.height * factor, : source.width * factor]
        return TensorRaster(pixels.clamp(-1, 1).cpu())

    def _sample(
        self,
        lowres: Float[Tensor, "1 3 h w"],
        start: Float[Tensor, "1 3 H W"],
        num_inference_steps: int,
        batch: int | None,
    ) -> Float[Tensor, "1 3 H W"]:
        """Return the sample; where memory runs out after all, with half the views at once."""
        config = self.config
        windows = {"window_px": config.window_px, "stride_px": config.stride_px}
        num_views = len(window_views(*start.shape[-2:], **windows))
        batch = min(batch or self.affordable_views(start.device), num_views)
        while True:
            try:
                return sample_teacher(
                    self.sr,
                    lowres,
                    start=start,
                    num_inference_steps=num_inference_steps,
                    view_batch_size=batch,
                    **windows,
                )
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
            batch //= 2
            logger.warning("out of memory: going on with view_batch_size=%d", batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def affordable_views(self, device: torch.device) -> int:
        """Return how many windows the device's free memory holds at once.

        A CPU gains nothing by a batch and would round otherwise, so it takes them one by one.
        """
        if device.type != "cuda":
            return 1
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return views_that_fit(
            free_bytes,
            window_px=self.config.window_px,
            channels=self.sr.level_channels[0],
            itemsize=self.sr.dtype.itemsize,
        )


def views_that_fit(free_bytes: int, *, window_px: int, channels: int, itemsize: int) -> int:
    """Return the number of windows whose feature maps fit into the free memory; at least one."""
    bytes_per_view = FEATURE_MAPS_AT_ONCE * window_px**2 * channels * itemsize
    return max(1, int(SHARE_OF_FREE_MEMORY * free_bytes) // bytes_per_view)


def scale_of_released_file(name: str) -> int:
    """Return what a file name says: 4 for ``…x4…`` and the bare ``KandiSuperRes.ckpt``, else 2."""
    stem = name.rsplit(".", 1)[0].lower()
    return 4 if re.search(r"x4(?!\d)", stem) or stem == "kandisuperres" else 2
