"""What Python holds a picture in (PIL, numpy, torch), to rasters and back."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ksr_distill.inference.rasters import Raster, TensorRaster, strips

Picture = PIL.Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]

ROWS_AT_ONCE = 256


def as_rasters(image: Pictures) -> list[Raster]:
    """Return one raster for each picture.

    Raises:
        ValueError: For a shape or range that is no picture's.
    """
    if isinstance(image, PIL.Image.Image):
        return [TensorRaster(pil_to_tensor(image))]
    if isinstance(image, np.ndarray):
        batch = image if image.ndim == 4 else image[None]
        return [TensorRaster(array_to_tensor(one)) for one in batch]
    if isinstance(image, Tensor):
        batch = image if image.ndim == 4 else image[None]
        return [TensorRaster(tensor_to_signed(one)) for one in batch]
    if not isinstance(image, Sequence) or not image:
        raise ValueError(
            f"image is {'an empty list' if image == [] else type(image).__name__}; give a PIL "
            "image, an array, a tensor, or a list of them"
        )
    return [raster for one in image for raster in as_rasters(one)]


def pil_to_tensor(image: PIL.Image.Image) -> Float[Tensor, "3 h w"]:
    """Return a PIL image in [-1, 1], as RGB; 16-bit grey keeps its bits.

    ``convert("RGB")`` would clip 16-bit grey to 255.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32)[:, :, None] / 65535
        return array_to_tensor(np.repeat(grey, 3, axis=2))
    return array_to_tensor(np.asarray(image.convert("RGB")))


def array_to_tensor(array: np.ndarray) -> Float[Tensor, "3 h w"]:
    """Return an (H, W, 3) or (H, W, 1) array in [-1, 1]."""
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"image has shape {array.shape}; an array is (height, width, 3) or (…, 1)")
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype in (np.uint8, np.uint16):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    return tensor_to_signed(torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32)))


def tensor_to_signed(tensor: Tensor) -> Float[Tensor, "3 h w"]:
    """Return a (3, h, w) tensor of [0, 1] or uint8 in [-1, 1], on the CPU."""
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise ValueError(f"image has shape {tuple(tensor.shape)}; a tensor is (3, height, width)")
    tensor = tensor.cpu()
    unit = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    low, high = float(unit.min()), float(unit.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"image spans {low:.3g}…{high:.3g}; floats must lie in [0, 1]")
    return unit * 2 - 1


def from_rasters(
    rasters: Sequence[Raster], output_type: str
) -> list[PIL.Image.Image] | list[np.ndarray] | list[Tensor] | np.ndarray | Tensor:
    """Return pictures as ``pil``, ``np`` or ``pt``; arrays are stacked where sizes agree."""
    if output_type == "pil":
        return [PIL.Image.fromarray(to_uint8(raster)) for raster in rasters]
    units = [to_unit(raster) for raster in rasters]
    alike = len({unit.shape for unit in units}) == 1
    if output_type == "pt":
        return torch.stack(units) if alike else units
    arrays = [unit.permute(1, 2, 0).numpy() for unit in units]
    return np.stack(arrays) if alike else arrays


def to_unit(raster: Raster) -> Float[Tensor, "3 H W"]:
    """Return the whole raster in [0, 1]."""
    whole = torch.cat(list(strips(raster, rows_at_once=ROWS_AT_ONCE)), dim=1)
    return (whole / 2 + 0.5).clamp_(0, 1)


def to_uint8(raster: Raster) -> UInt8[np.ndarray, "H W 3"]:
    """Return the whole raster rounded to 8 bits, strip by strip."""
    rows = strips(raster, rows_at_once=ROWS_AT_ONCE)
    return np.concatenate([quantised(strip, bits=8) for strip in rows])


def quantised(strip: Float[Tensor, "c h w"], *, bits: int) -> np.ndarray:
    """Return (h, w, c) integers of 8 or 16 bits, rounded to the nearest."""
    peak = 2**bits - 1
    unit = (strip.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    return (unit * peak).round_().numpy().astype(np.uint8 if bits == 8 else np.uint16)
