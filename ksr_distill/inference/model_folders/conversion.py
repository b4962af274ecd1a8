"""Released files to models; every error begins with the file it is about."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, VQModel
from torch import Tensor

from ksr_distill.inference.model_folders.files import check_same_weights, load_model, new_file
from ksr_distill.models import KSRUNet, RefinerContext, RefinerUNet
from ksr_distill.models.released_files import (
    check_tensors,
    read_content,
    read_state_dict,
    read_tensor,
)
from ksr_distill.models.weight_configs import sr_unet_config
from ksr_distill.models.weights import (
    context_from_released,
    movq_from_released,
    refiner_from_released,
    released_state_dict,
    sr_unet_from_released,
)

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=ModelMixin)


def read_sr_unet(path: Path, *, num_groups: int | None = None) -> KSRUNet:
    """Return the U-Net of a released file, or of a model folder of ours.

    Args:
        num_groups: See ``sr_unet_from_released``.
    """

    def convert() -> KSRUNet:
        return sr_unet_from_released(read_state_dict(path, "sr-unet"), num_groups=num_groups)

    return _read(path, KSRUNet, convert, "sr")


def read_refiner(
    path: Path, *, num_groups: int | None = None, head_dim: int | None = None
) -> RefinerUNet:
    """Return the refiner of a released file, or of a model folder of ours.

    Args:
        num_groups: See ``refiner_from_released``.
        head_dim: Likewise.
    """

    def convert() -> RefinerUNet:
        state_dict = read_state_dict(path, "refiner")
        return refiner_from_released(state_dict, num_groups=num_groups, head_dim=head_dim)

    return _read(path, RefinerUNet, convert, "refiner")


def read_movq(path: Path, *, num_groups: int | None = None) -> VQModel:
    """Return the MoVQ of a released file, or of a model folder.

    Args:
        num_groups: See ``movq_from_released``.
    """

    def convert() -> VQModel:
        return movq_from_released(read_state_dict(path, "movq"), num_groups=num_groups)

    return _read(path, VQModel, convert, "movq")


def read_context(path: Path, *, mask_path: Path | None = None) -> RefinerContext:
    """Return the one-token context of a released file, or of a model folder of ours.

    Args:
        mask_path: The released ``context_mask.pt``; see ``context_from_released``.
    """

    def convert() -> RefinerContext:
        context = read_tensor(path, "context")
        if context.ndim != 3 or context.shape[0] != 1:
            raise ValueError(f"its shape is {tuple(context.shape)}, a context's is (1, n, 4096)")
        return context_from_released(context, None if mask_path is None else _read_mask(mask_path))

    return _read(path, RefinerContext, convert, "context")


def write_original(
    model: ModelMixin, path: Path, *, null_embedding: Tensor | None = None, overwrite: bool = False
) -> None:
    """Write a file for the released code: ``{'unet': …}``, or the bare state dict of a MoVQ.

    A warning says so where the file alone does not tell the number of groups, or lacks what the
    released code asks for.

    Args:
        null_embedding: Of ``read_null_embedding``. The released code asks a refiner's file for it.
    """
    state_dict = released_state_dict(model)
    content: dict[str, Any] = state_dict if isinstance(model, VQModel) else {"unet": state_dict}
    if isinstance(model, KSRUNet):
        _warn_of_unusual_groups(model, state_dict, path)
    if null_embedding is not None and not isinstance(model, RefinerUNet):
        raise ValueError(f"--null-embedding belongs to a refiner, not to a {type(model).__name__}")
    if null_embedding is not None:
        content["null_embedding"] = null_embedding
    elif isinstance(model, RefinerUNet):
        logger.warning(
            "%s has no null_embedding, which the released code asks for: to take it over, give "
            "--null-embedding kandinsky3_flash.pt",
            path,
        )
    with new_file(path, overwrite=overwrite) as scratch:
        torch.save(content, scratch)
        read = read_content(scratch)
        check_same_weights(state_dict, read if isinstance(model, VQModel) else read["unet"], path)


def read_null_embedding(path: Path) -> Tensor:
    """Return the null_embedding of a released refiner's file, which no network of ours uses."""
    with _errors_begin_with(path):
        content = read_content(path)
        if not isinstance(content, Mapping) or "null_embedding" not in content:
            raise ValueError("has no null_embedding; give the released kandinsky3_flash.pt")
        return check_tensors({"null_embedding": content["null_embedding"]}, path)["null_embedding"]


def _warn_of_unusual_groups(unet: KSRUNet, state_dict: Mapping[str, Tensor], path: Path) -> None:
    guessed = sr_unet_config({name: value.shape for name, value in state_dict.items()})
    if guessed["num_groups"] != unet.config.num_groups:
        logger.warning(
            "%s has %d groups in its group norms, which the file cannot say: pass "
            "groups=%d to the released code, or --num-groups to `ksr convert sr-unet`",
            path,
            unet.config.num_groups,
            unet.config.num_groups,
        )


def _read(
    path: Path, model_class: type[Model], convert: Callable[[], Model], component: str
) -> Model:
    with _errors_begin_with(path):
        if not path.is_dir():
            return convert()
        model = load_model(path, component)
        if not isinstance(model, model_class):
            raise ValueError(f"holds a {type(model).__name__}, not a {model_class.__name__}")
        return model


def _read_mask(path: Path) -> Tensor:
    with _errors_begin_with(path):
        mask = read_content(path)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
            raise ValueError("holds no mask: (1, n) integers or booleans")
        return mask


@contextmanager
def _errors_begin_with(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from error
