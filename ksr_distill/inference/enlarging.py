"""The base of both pipelines: enlarges pictures to any scale in passes of the model's own."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ksr_distill.inference.devices.memory import largest_fitting_tile
from ksr_distill.inference.pictures.images import (
    Pictures,
    alphas,
    as_rasters,
    colour_profiles,
    from_rasters,
)
from ksr_distill.inference.pictures.rasters import Raster, ResampledRaster
from ksr_distill.inference.tiling.passes import TilePass, Tiling, plan_passes, run_passes
from ksr_distill.model_json import as_object
from ksr_distill.models.alignment import align_weights
from ksr_distill.types import StepObserver

StepCallback = Callable[[DiffusionPipeline, int, int, dict[str, Tensor]], dict[str, Tensor] | None]

MAX_SIDE_PX = 2**31 - 1
"""The largest side that PNG and libvips can represent."""

OUTPUT_TYPES = ("pil", "np", "pt")


class EnlargingPipeline(DiffusionPipeline):
    """A pipeline that enlarges pictures of any size by any scale ≥ 1.

    Passes of the model's own scale until the size is reached or exceeded, the last one resized
    down; tiles where a pass is larger than one. A subclass says what a pass is.
    """

    # diffusers reads the class's list.
    _callback_tensor_inputs = ["pred_x_0"]  # noqa: RUF012

    @property
    def num_timesteps(self) -> int:
        """Sampling steps for each batch of tiles, in the current or last call."""
        return self._num_timesteps

    def register_modules(self, **components: ModelMixin | None) -> None:
        """Register the components, with their weights aligned in memory."""
        for component in components.values():
            if component is not None:
                align_weights(component)
        super().register_modules(**components)

    def register_to_config(self, **kwargs: object) -> None:
        """Record our classes by their public module path, which must never change."""
        super().register_to_config(**{name: public_path(value) for name, value in kwargs.items()})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> Any:
        """Return the pipeline of a model folder, its weights from safetensors files, never pickles.

        Args:
            options: As diffusers takes them.

        Raises:
            ValueError: If a path is no folder, or its index is not one of this pipeline.
        """
        folder = pretrained_model_name_or_path
        # diffusers would take its name for one on the Hub.
        if isinstance(folder, os.PathLike) and not Path(folder).is_dir():
            raise ValueError(f"{folder} is no model folder; give one made by ksr export")
        return super().from_pretrained(folder, **{"use_safetensors": True, **options})

    @classmethod
    def component_names(cls) -> list[str]:
        """Return the names of the networks, those that may be left out among them."""
        return sorted(cls._get_signature_keys(cls)[0])

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return model_index.json, with this package's classes where a folder brings its own.

        Raises:
            ValueError: If it is no index, a setting in it is none, or the folder is another
                pipeline's: a teacher's weights also run as a student's, and give a wrong picture.
        """
        folder = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        index = super().load_config(*args, **kwargs)
        where = f"{folder}: model_index.json"
        check_index(index, cls.component_names(), where=where)
        index = own_classes(cast(dict[str, Any], index))
        found = index.get("_class_name")
        others = {c.__name__ for c in EnlargingPipeline.__subclasses__() if not issubclass(cls, c)}
        if found in others:
            raise ValueError(
                f"{folder} holds a {found}, not a {cls.__name__}; load it with "
                f"{found}.from_pretrained"
            )
        try:
            cls.check_settings(index)
        except ValueError as error:
            raise ValueError(f"{where} cannot be used: {error}") from error
        return index

    def passes(self, scale: float | int, *, seed: int, **options: Any) -> list[TilePass]:
        """Return the passes that reach or exceed the scale, for ``run_passes``."""
        raise NotImplementedError

    def enlarge(
        self,
        source: Raster,
        scale: float | int | None = None,
        *,
        seed: int,
        tiling: Tiling,
        on_tile: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Raster:
        """Return a raster enlarged, tile by tile, in memory.

        Args:
            options: As ``passes`` takes them.
        """
        scale = self.config.scale if scale is None else scale
        passes = self.passes(scale, seed=seed, **options)
        enlarged = run_passes(source, passes, tiling=tiling, on_tile=on_tile)
        return resized(enlarged, source, scale)

    def register_settings(self, **settings: object) -> None:
        """Record settings in the config.

        Raises:
            ValueError: If one is not allowed.
        """
        self.check_settings(settings)
        self.register_to_config(**settings)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not allowed; subclasses check their own ones, too.

        Args:
            settings: Those given; the constructor's defaults are not among them.

        Raises:
            ValueError: If one is not allowed.
        """
        check_whole(settings, "scale", lowest=2)

    def check_scale(self, scale: float | int | None) -> None:
        """Refuse a scale below 1, or one whose result no file could hold."""
        if scale is not None and not 1 <= scale <= MAX_SIDE_PX:
            raise ValueError(
                f"scale={scale} is no enlargement; use any number from 1 to {MAX_SIDE_PX}"
            )

    def _enlarge_all(
        self,
        image: Pictures,
        scale: float | int | None,
        *,
        tiling: Tiling,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        **options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Return every picture enlarged, as diffusers' pipelines return them."""
        self.check_scale(scale)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        sources = as_rasters(image)
        seeds = draw_seeds(generator, len(sources))
        passes = self.passes(scale or self.config.scale, seed=0, **options)
        plans = [plan_passes(s.height, s.width, passes, tiling) for s in sources]
        with self.progress_bar(
            total=sum(len(plan) for pass_plans in plans for plan in pass_plans)
        ) as bar:
            options["on_tile"] = lambda _: bar.update()
            results = (
                self.enlarge(source, scale, seed=seed, tiling=tiling, **options)
                for source, seed in zip(sources, seeds, strict=True)
            )
            images = from_rasters(results, output_type, alphas(image), colour_profiles(image))
        self.maybe_free_model_hooks()
        # diffusers' annotation forgets that its own pipelines put tensors here, too.
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def _default_tile_px(self) -> int:
        return largest_fitting_tile(self.passes(1, seed=0)[0], self._execution_device)

    def _observer(
        self, callback: StepCallback | None, tensor_inputs: Sequence[str]
    ) -> StepObserver | None:
        """Return an observer that calls the callback and passes on the pred_x_0 that it returns."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; "
                f"known are {self._callback_tensor_inputs}"
            )
        if callback is None:
            return None

        def on_step(step: int, timestep: int, pred_x_0: Tensor) -> Tensor | None:
            tensors = {"pred_x_0": pred_x_0}
            offered = {name: tensors[name] for name in tensor_inputs}
            returned = callback(self, step, timestep, offered) or {}
            return returned.get("pred_x_0")

        return on_step


MODELS = "ksr_distill.models"


def public_path(value: object) -> object:
    """Return (module, class) with the public module of our classes; anything else unchanged."""
    if isinstance(value, tuple) and str(value[0]).startswith(f"{MODELS}."):
        return (MODELS, *value[1:])
    return value


def check_whole(
    settings: Mapping[str, Any], name: str, *, lowest: int, highest: int | None = None
) -> None:
    """Refuse a setting that is given and is no whole number from the lowest to the highest."""
    value = settings.get(name, lowest)
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        allowed = f"from {lowest} " + ("on" if highest is None else f"to {highest}")
        raise ValueError(f"the model's {name}={value!r} is not a whole number {allowed}")


def check_index(index: object, component_names: Sequence[str], *, where: str) -> None:
    """Refuse what is no index of a pipeline with these components.

    Raises:
        ValueError: If it is no object, or a component in it no pair of library and class.
    """
    index = as_object(index, where=where)
    match index.get("_class_name"):
        case str() | [str(), str()]:
            pass
        case other:
            raise ValueError(f"{where} has _class_name={other!r}, not the name of a class")
    for name in component_names:
        match index.get(name, [None, None]):
            case [str() | None, str() | None]:
                continue
            case other:
                raise ValueError(
                    f"{where} has {name}={other!r}, not [library, class]; copy the model folder "
                    "again"
                )


def own_classes(index: dict[str, Any]) -> dict[str, Any]:
    """Return the index of a self-contained folder with this package's classes.

    Such a folder carries copies of our code for users without the package; with the package no
    ``trust_remote_code`` is needed. Within those copies the index is returned unchanged.
    """
    if not __name__.startswith("ksr_distill."):
        return index
    own = {
        name: [MODELS, *value[1:]] if isinstance(value, list) and value[:1] == ["models"] else value
        for name, value in index.items()
    }
    class_name = own.get("_class_name")
    return own | {"_class_name": class_name[-1] if isinstance(class_name, list) else class_name}


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
