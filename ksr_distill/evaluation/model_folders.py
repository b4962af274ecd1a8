"""Loads a model folder of any kind for sampling."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError

from ksr_distill.inference import KSRFlashPipeline
from ksr_distill.inference.model_folders.files import load_model
from ksr_distill.inference.model_folders.loading import load_pipeline
from ksr_distill.model_json import read_object
from ksr_distill.models import KSRUNet

SamplerName = Literal["student", "ddim", "dpm"]


@dataclass(frozen=True)
class ModelFolder:
    """A loaded folder.

    Attributes:
        pipeline: The student's; for a teacher, one of which only `sr` is used.
        sampler: What the folder is made for; None if it does not say.
        num_inference_steps: A teacher's default; None if the folder does not say.
    """

    pipeline: KSRFlashPipeline
    sampler: SamplerName | None
    num_inference_steps: int | None


def load_model_folder(path: Path, *, scale: int, device: torch.device, half: bool) -> ModelFolder:
    """Return a student's or a teacher's folder, or a bare U-Net's.

    Raises:
        ValueError: If the folder is no model's, or made for another scale.
    """
    index = read_index(path)
    own_scale = index.get("scale", scale)
    if own_scale != scale:
        raise ValueError(
            f"model={path} enlarges by {own_scale}, the benchmark is ×{scale}; "
            f"give a benchmark of the model's scale, or scale={own_scale} with photos"
        )
    class_name = index.get("_class_name")  # a self-contained folder names a module before it
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name == KSRFlashPipeline.__name__:
        pipeline = cast(KSRFlashPipeline, load_pipeline(path, device=device, fp32=not half))
        pipeline.sr.eval()
        return ModelFolder(pipeline, "student", None)
    unet = _load_unet(path / "sr" if index else path).eval()
    pipeline = KSRFlashPipeline(sr=unet, scale=scale).to(device)
    steps = index.get("num_inference_steps")
    return ModelFolder(pipeline, "dpm" if index else None, steps)


def read_index(path: Path) -> dict[str, Any]:
    """Return a folder's model_index.json; nothing for a bare U-Net's folder.

    Raises:
        ValueError: If it is no model's folder.
    """
    index = path / "model_index.json"
    if index.is_file():
        return read_object(index)
    if not (path / "config.json").is_file():
        state = "has neither model_index.json nor config.json" if path.exists() else "is not there"
        raise ValueError(
            f"model={path} {state}; give what `ksr export` made, or a checkpoint of train.py"
        )
    return {}


def _load_unet(folder: Path) -> KSRUNet:
    """Return the U-Net in float32, from its half-precision files where there are no others."""
    try:
        unet = load_model(folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(unet, KSRUNet):
        raise ValueError(f"{folder} holds a {type(unet).__name__}; give a KSRUNet's folder")
    return unet.float()
