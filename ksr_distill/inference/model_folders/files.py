"""Model folders: written whole or not at all, and read back before anything is called done."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin, VQModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksr_distill.durable import replacing
from ksr_distill.model_json import read_object
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet
from ksr_distill.models.weights import check_names_and_shapes

HALF_VARIANT = "fp16"

MODEL_CLASSES: dict[str, type[ModelMixin]] = {
    model_class.__name__: model_class
    for model_class in (KSRUNet, RefinerUNet, RefinerContext, VQModel)
}


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes the target when the block ends without an error.

    Args:
        overwrite: Replace the model folder that is there; it stays until the new one is complete.

    Raises:
        ValueError: If the target exists, is not empty, and may not be overwritten; or is something
            else than a model folder, a folder of photos for one.
    """
    refuse_existing(target, overwrite=overwrite)
    if target.exists() and not is_replaceable(target):
        raise ValueError(f"{target} is no model folder, which --overwrite replaces; use another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as folder:
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for its owner alone


@contextmanager
def new_file(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path that becomes the target when the block ends without an error.

    Args:
        overwrite: Replace the file that is there, in one step.
    """
    refuse_existing(target, overwrite=overwrite)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as new:
        yield new


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse a target with something in it: before the work, not after."""
    is_taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if is_taken and not overwrite:
        raise ValueError(f"{target} exists already; give another name, or --overwrite")


def is_replaceable(target: Path) -> bool:
    """Tell whether nothing but a model, or nothing at all, is lost with a folder."""
    if not target.is_dir():
        return False
    files = {path.name for path in target.iterdir()}
    return not files or bool(files & {"model_index.json", "config.json"})


def save_model(model: ModelMixin, folder: Path, *, with_half: bool = False) -> None:
    """Write a model's folder and read it back.

    Args:
        with_half: Add the ``fp16`` variant. The model itself is in half precision afterwards:
            a second copy of three billion parameters would not fit everywhere.

    Raises:
        ValueError: If what is read back differs, or a weight overflows in half precision.
    """
    model.save_pretrained(folder)
    _check_reads_back(model, folder, variant=None)
    if with_half:
        halve(model)
        model.save_pretrained(folder, variant=HALF_VARIANT)
        _check_reads_back(model, folder, variant=HALF_VARIANT)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, *, with_half: bool = False) -> None:
    """Write a pipeline's folder and read its components back.

    Args:
        with_half: Add the ``fp16`` variant; see ``save_model``.

    Raises:
        ValueError: If what is read back differs, or a weight overflows in half precision.
    """
    models = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, ModelMixin)
    }
    variants = [None, HALF_VARIANT] if with_half else [None]
    for variant in variants:
        if variant == HALF_VARIANT:
            for model in models.values():
                halve(model)
        pipeline.save_pretrained(folder, variant=variant)
        for name, model in models.items():
            _check_reads_back(model, folder / name, variant=variant)
    # The index and the constructor agree; the weights were compared above.
    type(pipeline).from_pretrained(folder, local_files_only=True, **models)


def load_model(folder: Path, component: str | None = None) -> ModelMixin:
    """Return the model of a model folder, or one component of a pipeline's folder.

    Args:
        component: The name of the subfolder where the folder is a pipeline's; ``sr`` by default.

    Raises:
        ValueError: If the folder is neither, or holds a class that is not one of ours.
    """
    if (folder / "model_index.json").is_file():
        folder = folder / (component or "sr")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder} is no model folder: config.json is missing")
    class_name = read_object(config_file).get("_class_name")
    if class_name not in MODEL_CLASSES:
        raise ValueError(
            f"{config_file} names the class {class_name}; known are {', '.join(MODEL_CLASSES)}"
        )
    full, half = weight_files(folder)
    if not full and not half:
        raise ValueError(f"{folder} holds no safetensors file")
    variant, stored = (None, full) if full else (HALF_VARIANT, half)
    return _load(MODEL_CLASSES[class_name], folder, dtype=_dtype_in(stored[0]), variant=variant)


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a network's safetensors files: those of the usual and those of half precision."""
    files = sorted(folder.glob("*.safetensors"))
    half = [file for file in files if f".{HALF_VARIANT}" in file.name]
    return [file for file in files if file not in half], half


def check_pipeline_folder(
    folder: Path, component_names: Iterable[str], *, variant: str | None
) -> None:
    """Refuse a pipeline's folder of which a network's weights are not those of its config.

    diffusers leaves out what it does not know, and fails later, elsewhere, over what is missing.

    Args:
        component_names: Of the networks that the index may name; ``load_config`` has checked it.

    Raises:
        ValueError: If a config gives no network; a name is missing, unknown, or of another shape;
            or a file is damaged.
    """
    index = read_object(folder / "model_index.json")
    for name in component_names:
        library, class_name = index.get(name, (None, None))
        if library is None:
            continue
        if class_name not in MODEL_CLASSES:
            raise ValueError(f"{folder}: {name} is a {class_name}, not one of {[*MODEL_CLASSES]}")
        _check_weights_fit(MODEL_CLASSES[class_name], folder / name, variant=variant)


def _check_weights_fit(model_class: type[ModelMixin], folder: Path, *, variant: str | None) -> None:
    config_file = folder / "config.json"
    full, half = weight_files(folder)
    files = half if variant and half else full
    if not config_file.is_file() or not files:
        raise ValueError(f"{folder} lacks its config.json or its safetensors file; copy it again")
    expected = _shapes_of(model_class, config_file)
    given = {name: shape for file in files for name, shape in _shapes_in(file).items()}
    try:
        check_names_and_shapes(expected, given)
    except ValueError as error:
        raise ValueError(f"{folder} does not hold the weights of its config: {error}") from error


def _shapes_of(model_class: type[ModelMixin], config_file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network that a config gives; nothing is allocated."""
    config = read_object(config_file)
    try:
        with torch.device("meta"):
            model = model_class.from_config(config)
    except Exception as error:  # torch and diffusers raise many kinds for one mistake
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{config_file} gives no {model_class.__name__}: {reason}") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a safetensors file; copy the model folder again")
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; copy the model folder again") from error


def _dtype_in(file: Path) -> torch.dtype:
    with safe_open(file, "pt") as tensors:
        name = next(iter(tensors.keys()))
        return tensors.get_tensor(name).dtype


def _load(
    model_class: type[ModelMixin], folder: Path, *, dtype: torch.dtype, variant: str | None
) -> ModelMixin:
    """Return the model in a given dtype: float32 would double the memory of a half one."""
    with warnings.catch_warnings():
        # diffusers renames this argument; both names have to work over our range of versions.
        warnings.simplefilter("ignore", FutureWarning)
        return model_class.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )


def halve(model: ModelMixin) -> None:
    """Bring a model to half precision in place.

    Raises:
        ValueError: If a weight is larger than half precision can hold (65504).
    """
    for name, parameter in model.named_parameters():
        half = parameter.data.half()
        if not bool(torch.isfinite(half).all()):
            raise ValueError(f"{name} has values beyond 65504, which fp16 cannot hold")
        parameter.data = half


def _check_reads_back(model: ModelMixin, folder: Path, *, variant: str | None) -> None:
    loaded = _load(type(model), folder, dtype=model.dtype, variant=variant)
    check_same_weights(model.state_dict(), loaded.state_dict(), folder)


def check_same_weights(
    written: Mapping[str, Tensor], read: Mapping[str, Tensor], where: Path
) -> None:
    """Refuse weights that came back otherwise than they were written."""
    differing = [
        name
        for name, value in written.items()
        if name not in read or not torch.equal(value.float(), read[name].float())
    ]
    if differing or len(read) != len(written):
        raise ValueError(
            f"{where} reads back otherwise than it was written ({differing[:3]}); is the disk full "
            "or broken?"
        )
