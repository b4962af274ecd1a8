"""Loads a model folder onto a device, in a suitable dtype."""

import logging
import warnings
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from ksr_distill.inference.acceleration import accelerate, can_accelerate, why_kernels_fail
from ksr_distill.inference.devices import cpu
from ksr_distill.inference.devices.layout import lay_out
from ksr_distill.inference.devices.memory import as_size, free_memory_bytes, weight_bytes
from ksr_distill.inference.devices.offload import take_turns
from ksr_distill.inference.model_folders.files import (
    HALF_VARIANT,
    check_pipeline_folder,
    weight_files,
)
from ksr_distill.inference.pipeline import KSRFlashPipeline
from ksr_distill.inference.teacher import KSRTeacherPipeline
from ksr_distill.model_json import read_object

logger = logging.getLogger(__name__)

Pipeline = KSRFlashPipeline | KSRTeacherPipeline

PIPELINES: dict[str, type[Pipeline]] = {
    pipeline_class.__name__: pipeline_class
    for pipeline_class in (KSRFlashPipeline, KSRTeacherPipeline)
}

FAST_DTYPES = {"default": torch.float16}
HALF_DTYPES = {"default": torch.float16, "movq": torch.float32}
CPU_DTYPES = {"default": torch.bfloat16, "movq": torch.float32}


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the fastest there is."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # the meta device makes tensors, but gives none back
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"--device {name} is not usable here ({str(error).splitlines()[0].split('. ')[0]}); "
            "use cpu, or leave it out"
        ) from error
    return device


def runs_fast(device: torch.device) -> bool:
    """Tell whether a device has the fast way; where only its kernels cannot be built, say why."""
    if not can_accelerate(device):
        return False
    reason = why_kernels_fail(device)
    if reason is not None:
        logger.warning("the plain modules run, Triton cannot build its kernels: %s", reason)
    return reason is None


def load_pipeline(
    folder: Path, *, device: torch.device, fp32: bool = False, fast: bool = False
) -> Pipeline:
    """Return the pipeline of a model folder, a student's or a teacher's.

    Half precision on accelerators, with MoVQ in float32 as the released system runs it; on a CPU
    bfloat16 where it has the instructions, else float32. Weights that do not fit into the
    accelerator together are moved there one by one.

    Args:
        fp32: Full precision everywhere.
        fast: float16 everywhere and the operations of ``acceleration``, on an NVIDIA GPU.

    Raises:
        ValueError: If the folder is not a whole pipeline of ours, or the device has no fast way.
    """
    if fast and (fp32 or not can_accelerate(device)):
        raise ValueError(
            f"--fast does not fit {'--fp32' if fp32 else f'--device {device}'}; it is float16 by "
            "Triton kernels on an NVIDIA GPU of compute capability 8.0 or more, leave it out"
        )
    is_cpu = device.type == "cpu"
    half = not fp32 and (cpu.multiplies_bf16() if is_cpu else True)
    half_dtypes = CPU_DTYPES if is_cpu else FAST_DTYPES if fast else HALF_DTYPES
    pipeline = read_pipeline(folder, half_dtypes if half else torch.float32, half=half)
    if fast:
        networks = (getattr(pipeline, name, None) for name in ("sr", "refiner", "movq"))
        accelerate(*(network for network in networks if network is not None))
    return _placed(pipeline, device, fast=fast)


def read_pipeline(
    folder: Path, dtypes: torch.dtype | dict[str, torch.dtype], *, half: bool = False
) -> Pipeline:
    """Return the pipeline of a model folder as it is read, on the CPU.

    Args:
        dtypes: Of all networks, or of each.
        half: Read the files in half precision where there are such.

    Raises:
        ValueError: If the folder is not a whole pipeline of ours.
    """
    diffusers_logging.disable_progress_bar()
    pipeline_class = _pipeline_class(folder)
    pipeline_class.load_config(folder)
    variant = _variant(folder, half=half)
    check_pipeline_folder(folder, pipeline_class.component_names(), variant=variant)
    try:
        with warnings.catch_warnings():
            # diffusers renames this argument; both names have to work over our range of versions.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = pipeline_class.from_pretrained(
                folder, torch_dtype=dtypes, variant=variant, local_files_only=True
            )
    except (RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_class(folder: Path) -> type[Pipeline]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} is no model folder (model_index.json is missing); give one made by "
            "ksr export or ksr convert flash"
        )
    name = read_object(index).get("_class_name")
    if isinstance(name, list) and name:  # a self-contained folder names a module before it
        name = name[-1]
    if not isinstance(name, str) or name not in PIPELINES:
        raise ValueError(
            f"{index} names the class {name}; known are {', '.join(PIPELINES)}, made by "
            "ksr export, ksr convert flash or ksr convert teacher"
        )
    return PIPELINES[name]


def _variant(folder: Path, *, half: bool) -> str | None:
    """Return fp16 where such files are there and wanted, or where there are no others."""
    full_files, half_files = weight_files(folder / "sr")
    return HALF_VARIANT if half_files and (half or not full_files) else None


def _placed(pipeline: Pipeline, device: torch.device, *, fast: bool) -> Pipeline:
    models = [m for m in pipeline.components.values() if isinstance(m, ModelMixin)]
    if device.type == "cpu":
        lay_out(*models, memory_format=torch.channels_last)
    needed = weight_bytes(models)
    if device.type == "cuda" and needed > 0.6 * free_memory_bytes(device):
        logger.warning("%s of weights: the networks take turns on the GPU", as_size(needed))
        if fast:
            take_turns(pipeline, device)
        else:
            pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)
