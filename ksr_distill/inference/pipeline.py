"""The pipeline: a model folder and a picture in, a larger picture out."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, VQModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ksr_distill.diffusion import student_timesteps as evenly_spread_timesteps
from ksr_distill.inference.images import Pictures, alphas, as_rasters, from_rasters
from ksr_distill.inference.memory import largest_fitting_tile
from ksr_distill.inference.noise import PlaceNoise
from ksr_distill.inference.passes import (
    SuperResolutionPass,
    TilePass,
    Tiling,
    run_passes,
)
from ksr_distill.inference.rasters import Raster, ResampledRaster
from ksr_distill.inference.refine import RefinerPass, refine_timesteps
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet

StepCallback = Callable[[DiffusionPipeline, int, int, dict[str, Tensor]], object]


class KSRFlashPipeline(DiffusionPipeline):
    """Few-step super-resolution, with an optional refiner after each doubling.

    Pictures of any size and any scale ≥ 1: passes of the model's own scale until the size is
    reached or exceeded, the last one resized down; tiles where a pass is larger than one.

    Args:
        sr: The student.
        refiner: Kandinsky 3.0 Flash as an image refiner, or nothing.
        movq: The refiner's latent space, or nothing.
        context: The refiner's one prompt, or nothing.
        student_timesteps: The timesteps the student was trained for, noisiest first.
        scale: The factor the student was trained for.
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
        for component in (sr, refiner, movq, context):
            if component is not None:
                align_weights(component)
        self.register_modules(sr=sr, refiner=refiner, movq=movq, context=context)
        self.register_to_config(student_timesteps=list(student_timesteps), scale=scale)

    def register_to_config(self, **kwargs: object) -> None:
        """Record our classes by the room they are imported from: that path is public for good."""
        super().register_to_config(**{name: public_path(value) for name, value in kwargs.items()})

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return model_index.json, with this package's classes where a folder brings its own."""
        return own_classes(cast(dict[str, Any], super().load_config(*args, **kwargs)))

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
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return the pictures enlarged.

        Args:
            image: A PIL image, an (H, W, C) array or a (3, h, w) tensor, a batch of them, or a
                list. Integers span their range, floats [0, 1].
            scale: Any number ≥ 1; the model's own by default.
            num_inference_steps: Spread over the schedule as in training; by default the
                timesteps that the folder names.
            refine_steps: 0, 1 or 2 steps of the refiner after each pass.
            match_colours: Give the refined picture the coarse colours of the one before, so that
                tiles and passes cannot drift. The released pipeline does not.
            generator: One for all pictures, or one each. A picture's noise depends on its
                generator alone, so a batch gives what single pictures give.
            tile_px: Largest side of a tile in output pixels of a pass; by default what fits into
                the free memory, up to 2048 on a GPU and 1024 on a CPU.
            overlap_px: Width of the blended borders, an eighth of the tile by default.
            tile_batch_size: Tiles at once; changes the speed and the memory.
            output_type: ``pil`` (with the transparency of a PIL source), ``np`` ((b, H, W, 3) in
                [0, 1]) or ``pt`` ((b, 3, H, W) in [0, 1], on the CPU); lists where sizes differ.
            callback_on_step_end: Called with (pipeline, index, t, {"pred_x_0": …}) after each
                step of each batch of tiles.
        """
        sources = as_rasters(image)
        self.check_inputs(scale, refine_steps, output_type)
        if tile_px is None:
            tile_px = largest_fitting_tile(self.passes(1, seed=0)[0], self._execution_device)
        tiling = Tiling(tile_px, overlap_px, tile_batch_size)
        results = [
            self.enlarge(
                source,
                scale,
                seed=seed,
                tiling=tiling,
                num_inference_steps=num_inference_steps,
                refine_steps=refine_steps,
                match_colours=match_colours,
                on_step=self._step_counter(callback_on_step_end),
            )
            for source, seed in zip(sources, draw_seeds(generator, len(sources)), strict=True)
        ]
        images = from_rasters(results, output_type, alphas(image))
        self.maybe_free_model_hooks()
        # diffusers' annotation forgets that its own pipelines put tensors here, too.
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def enlarge(
        self,
        source: Raster,
        scale: float | int | None = None,
        *,
        seed: int,
        tiling: Tiling,
        num_inference_steps: int | None = None,
        refine_steps: int = 0,
        match_colours: bool = False,
        on_step: Callable[[int, int, Tensor], None] | None = None,
    ) -> Raster:
        """Return a raster enlarged, tile by tile, in memory."""
        scale = self.config.scale if scale is None else scale
        passes = self.passes(
            scale,
            seed=seed,
            num_inference_steps=num_inference_steps,
            refine_steps=refine_steps,
            match_colours=match_colours,
            on_step=on_step,
        )
        return resized(run_passes(source, passes, tiling=tiling), source, scale)

    def passes(
        self,
        scale: float | int,
        *,
        seed: int,
        num_inference_steps: int | None = None,
        refine_steps: int = 0,
        match_colours: bool = False,
        on_step: Callable[[int, int, Tensor], None] | None = None,
    ) -> list[TilePass]:
        """Return the passes that reach or exceed the scale, for ``run_passes``."""
        timesteps = self.config.student_timesteps
        if num_inference_steps is not None:
            timesteps = evenly_spread_timesteps(num_inference_steps)
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
                    dtype=self.sr.dtype,
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

    def check_inputs(self, scale: float | int | None, refine_steps: int, output_type: str) -> None:
        """Refuse what cannot be done, by its argument's name."""
        if scale is not None and not (scale >= 1 and math.isfinite(scale)):
            raise ValueError(f"scale={scale} is no enlargement; use any number ≥ 1")
        if refine_steps not in (0, 1, 2):
            raise ValueError(f"refine_steps={refine_steps} is not one of 0, 1, 2")
        if refine_steps and None in (self.refiner, self.movq, self.context):
            raise ValueError(
                f"refine_steps={refine_steps} needs a refiner, movq and context, which this model "
                "folder lacks; use refine_steps=0, or make the folder with ksr convert flash"
            )
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not one of pil, np, pt")

    def _step_counter(
        self, callback: StepCallback | None
    ) -> Callable[[int, int, Tensor], None] | None:
        """Return an observer that numbers the steps through all tiles and passes."""
        if callback is None:
            return None
        count = 0

        def on_step(_: int, timestep: int, pred_x_0: Tensor) -> None:
            nonlocal count
            callback(self, count, timestep, {"pred_x_0": pred_x_0})
            count += 1

        return on_step


COLOUR_CELL_PX = 64
"""Over how many pixels ``match_colours`` averages: one latent of the refiner's coarsest level."""

MODELS = "ksr_distill.models"


def public_path(value: object) -> object:
    """Return (module, class) with our inner modules left out, and anything else as it is."""
    if isinstance(value, tuple) and str(value[0]).startswith(f"{MODELS}."):
        return (MODELS, *value[1:])
    return value


def own_classes(index: dict[str, Any]) -> dict[str, Any]:
    """Return the index of a self-contained folder as if it were a plain one.

    Such a folder carries copies of our code for those who lack the package; whoever has it needs
    no ``trust_remote_code``. The copies themselves leave the index as it is.
    """
    if not __name__.startswith("ksr_distill."):
        return index
    own = {
        name: [MODELS, value[1]] if isinstance(value, list) and value[0] == "models" else value
        for name, value in index.items()
    }
    class_name = own.get("_class_name")
    return own | {"_class_name": class_name[-1] if isinstance(class_name, list) else class_name}


def align_weights(module: torch.nn.Module) -> None:
    """Move weights that lie at odd addresses of a CPU.

    safetensors maps a file, and its tensors begin where they begin; oneDNN then takes other
    kernels, and a loaded model differs from the saved one by 1e-6 (measured). 64 bytes are a
    cache line and torch's own alignment.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def num_passes(scale: float | int, factor: int) -> int:
    """Return how many passes of a factor reach the scale: at least one, which also cleans up."""
    passes, reached = 1, factor
    while reached < scale:
        passes, reached = passes + 1, reached * factor
    return passes


def resized(enlarged: Raster, source: Raster, scale: float | int) -> Raster:
    """Return the raster at the source's size times the scale, to the nearest pixel."""
    height, width = round(source.height * scale), round(source.width * scale)
    if (enlarged.height, enlarged.width) == (height, width):
        return enlarged
    return ResampledRaster(enlarged, height, width)


def draw_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """Return a seed for each picture; without a generator, from torch's global one."""
    generators: list[torch.Generator | None]
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(generators) != count:
        raise ValueError(f"generator is a list of {len(generators)} for {count} pictures")
    return [
        int(torch.randint(2**62, (), generator=g, device="cpu" if g is None else g.device))
        for g in generators
    ]
