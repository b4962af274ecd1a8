"""What Python holds a picture in (PIL, numpy, torch), to rasters and back.

uint8 and uint16 span their range, floats [0, 1]; no other type says which number is white.
"""

import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8, UInt16
from torch import Tensor

from ksr_distill.inference.pictures.rasters import Raster, ResampledRaster, TensorRaster, strips

ImageLike = PIL.Image.Image | np.ndarray | Tensor
Pictures = ImageLike | Sequence[ImageLike]

ROWS_AT_ONCE = 256

PEAKS = {torch.uint8: 255, torch.uint16: 65535}
"""The integer types that are read, and what is white in each."""

ORIENTATION = 0x0112
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""What turns a picture upright (EXIF 2.32, §4.6.4, Orientation), as ``ImageOps.exif_transpose``,
which fails where it cannot write the EXIF anew."""

RGB_MODES = ("RGB", "RGBA", "RGBX", "P")
"""PIL's modes whose numbers an RGB profile explains, before and after ``convert("RGB")``."""

BLUR_SIGMAS_PX = (32.0, 8.0, 2.0)
"""How far colour bleeds into transparent places, far to near, in pixels of the source."""

BLUR_LEAST_WEIGHT = 0.2
"""Where the blur's kernel ends, as in libvips."""


def as_rasters(image: Pictures) -> list[Raster]:
    """Return one raster for each picture.

    Raises:
        ValueError: For a shape, a type or a range that is no picture's.
    """
    if isinstance(image, PIL.Image.Image):
        return [TensorRaster(pil_to_tensor(upright_image(image)))]
    if isinstance(image, np.ndarray):
        batch = image if image.ndim == 4 else image[None]
        return [TensorRaster(array_to_tensor(one)) for one in batch]
    if isinstance(image, Tensor):
        batch = image if image.ndim == 4 else image[None]
        return [TensorRaster(tensor_to_signed(one)) for one in batch]
    if not isinstance(image, Sequence) or isinstance(image, str) or not image:
        raise ValueError(
            f"image is {'an empty list' if image == [] else type(image).__name__}; give a PIL "
            "image, an array, a tensor, or a list of them"
        )
    return [raster for one in image for raster in as_rasters(one)]


def upright_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a PIL image turned as its EXIF says: the result has none that could say it again."""
    image.load()  # turns a TIFF by itself, and takes the orientation out of its EXIF
    try:
        orientation = image.getexif().get(ORIENTATION)
    except (SyntaxError, ValueError, struct.error):  # damaged EXIF says nothing of the pixels
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def colour_profiles(image: Pictures) -> list[bytes | None]:
    """Return each picture's ICC profile, where it is one of RGB: that is what comes out.

    A profile's bytes 16 to 19 name its colours (ICC.1:2022, §7.2.6).
    """
    if isinstance(image, PIL.Image.Image):
        profile = image.info.get("icc_profile") or b""
        return [profile if profile[16:20] == b"RGB " and image.mode in RGB_MODES else None]
    if isinstance(image, np.ndarray | Tensor):
        return [None] * (len(image) if image.ndim == 4 else 1)
    return [profile for one in image for profile in colour_profiles(one)]


def pil_to_tensor(image: PIL.Image.Image) -> Float[Tensor, "3 h w"]:
    """Return a PIL image's colour in [-1, 1]; 16-bit grey keeps its bits.

    ``convert("RGB")`` would clip 16-bit grey to 255, and show what hides under transparency.
    Mode ``I`` is 16-bit grey like ``I;16``: 65535 is white, whatever the largest value is.

    Raises:
        ValueError: For mode ``F``, which says no range, and values of ``I`` beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError(
            "image has PIL mode F, whose floats say no range; give an array of uint8 or uint16, "
            "or of floats in [0, 1], of shape (height, width, 1)"
        )
    if image.has_transparency_data:
        rgba = colour_and_alpha(image)
        return visible_colour(rgba[:3], rgba[3:]) * 2 - 1
    if image.mode.startswith("I"):
        return array_to_tensor(wide_samples(image)[:, :, None])
    return array_to_tensor(np.asarray(image.convert("RGB")))


def colour_and_alpha(image: PIL.Image.Image) -> Float[Tensor, "4 h w"]:
    """Return a transparent PIL image in [0, 1]; 16-bit grey has one transparent value (PNG)."""
    if not image.mode.startswith("I"):
        return torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    samples = wide_samples(image)
    grey = torch.from_numpy(samples).float() / PEAKS[torch.uint16]
    visible = torch.from_numpy(samples != image.info["transparency"]).float()
    return torch.stack([grey, grey, grey, visible])


def wide_samples(image: PIL.Image.Image) -> UInt16[np.ndarray, "h w"]:
    """Return the samples of the modes ``I`` and ``I;16``: how Pillow opens 16-bit grey."""
    samples = np.asarray(image)
    low, high = samples.min(initial=0), samples.max(initial=0)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ValueError(
            f"image has PIL mode {image.mode} with values {low}…{high}, which is read as 16-bit "
            "grey, 0…65535; give an array of floats in [0, 1], of shape (height, width, 1)"
        )
    return samples.astype(np.uint16)


def visible_colour(
    colour: Float[Tensor, "3 h w"], alpha: Float[Tensor, "1 h w"]
) -> Float[Tensor, "3 h w"]:
    """Return colours of [0, 1] where wholly transparent places have those next to them.

    ``pictures.bleed`` does it to files with libvips, in little memory. This module needs torch
    alone, because it travels in self-contained model folders.
    """
    if float(alpha.min()) > 0 or float(alpha.max()) == 0:
        return colour * alpha.sign()
    weighted = torch.cat([colour * alpha, alpha])
    mean = weighted.mean(dim=(1, 2), keepdim=True)
    fill = (mean[:3] / mean[3:]).expand_as(colour)
    for sigma in BLUR_SIGMAS_PX:
        near = blurred(weighted, sigma)
        fill = torch.where(near[3:] > 1e-3, near[:3] / (near[3:] + 1e-6), fill)
    return torch.where(alpha > 0, colour, fill.clamp(0, 1))


def blurred(pixels: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    """Return a Gaussian blur; the edges are repeated."""
    reach = int(sigma * (-2 * math.log(BLUR_LEAST_WEIGHT)) ** 0.5)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(len(pixels), 1, 1, -1)
    padded = F.pad(pixels[None], (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(padded, kernel, groups=len(pixels))
    return F.conv2d(across, kernel.mT, groups=len(pixels))[0]


def alphas(image: Pictures) -> list[Raster | None]:
    """Return the transparency of each picture that has one; arrays and tensors have none."""
    if isinstance(image, PIL.Image.Image):
        if not image.has_transparency_data:
            return [None]
        return [TensorRaster(colour_and_alpha(upright_image(image))[3:] * 2 - 1)]
    if isinstance(image, np.ndarray | Tensor):
        return [None] * (len(image) if image.ndim == 4 else 1)
    return [alpha for one in image for alpha in alphas(one)]


def array_to_tensor(array: np.ndarray) -> Float[Tensor, "3 h w"]:
    """Return an (H, W, 3) or (H, W, 1) array of uint8, uint16 or [0, 1] in [-1, 1]."""
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"image has shape {array.shape}; an array is (height, width, 3) or (…, 1)")
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif array.dtype.kind not in "fb":
        raise ValueError(of_unknown_range(array.dtype))
    return tensor_to_signed(torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32)))


def tensor_to_signed(tensor: Tensor) -> Float[Tensor, "3 h w"]:
    """Return a (3, h, w) tensor of uint8, uint16 or [0, 1] in [-1, 1], on the CPU."""
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise ValueError(f"image has shape {tuple(tensor.shape)}; a tensor is (3, height, width)")
    if not (tensor.dtype in PEAKS or tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(of_unknown_range(tensor.dtype))
    unit = tensor.cpu().float() / PEAKS.get(tensor.dtype, 1)
    low, high = float(unit.min()), float(unit.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"image spans {low:.3g}…{high:.3g}; floats must lie in [0, 1]")
    return unit * 2 - 1


def of_unknown_range(dtype: np.dtype | torch.dtype) -> str:
    """Return why a type is refused."""
    return (
        f"image has dtype {dtype}; convert it to uint8 or uint16, which span their range, or to "
        "floats in [0, 1]"
    )


def from_rasters(
    rasters: Iterable[Raster],
    output_type: str,
    alphas: Sequence[Raster | None],
    profiles: Sequence[bytes | None],
) -> list[PIL.Image.Image] | list[np.ndarray] | list[Tensor] | np.ndarray | Tensor:
    """Return pictures as ``pil``, ``np`` or ``pt``; arrays are stacked where sizes agree.

    Args:
        rasters: Asked for one by one: each is on the CPU before the next is made.
        alphas: Each source's transparency, of the source's size; PIL images get it, enlarged.
        profiles: Each source's ICC profile; PIL images get it as their own have it, in ``info``.
    """
    if output_type == "pil":
        return [
            to_pil(raster, alpha, profile)
            for raster, alpha, profile in zip(rasters, alphas, profiles, strict=True)
        ]
    units = [to_unit(raster) for raster in rasters]
    alike = len({unit.shape for unit in units}) == 1
    if output_type == "pt":
        return torch.stack(units) if alike else units
    arrays = [unit.permute(1, 2, 0).numpy() for unit in units]
    return np.stack(arrays) if alike else arrays


def to_pil(raster: Raster, alpha: Raster | None, profile: bytes | None) -> PIL.Image.Image:
    """Return the raster as a PIL image with its source's transparency and profile."""
    image = PIL.Image.fromarray(with_alpha(raster, alpha))
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def to_unit(raster: Raster) -> Float[Tensor, "3 H W"]:
    """Return the whole raster in [0, 1], on the CPU."""
    whole = torch.cat(list(strips(raster, rows_at_once=ROWS_AT_ONCE)), dim=1)
    check_has_numbers(whole)
    return (whole / 2 + 0.5).clamp_(0, 1).cpu()


def with_alpha(raster: Raster, alpha: Raster | None) -> UInt8[np.ndarray, "H W c"]:
    """Return the raster in 8 bits, with its source's transparency enlarged to its size."""
    if alpha is None:
        return to_uint8(raster)
    resized = ResampledRaster(alpha, raster.height, raster.width)
    return np.dstack([to_uint8(raster), to_uint8(resized)])


def to_uint8(raster: Raster) -> UInt8[np.ndarray, "H W c"]:
    """Return the whole raster rounded to 8 bits, strip by strip."""
    rows = strips(raster, rows_at_once=ROWS_AT_ONCE)
    return np.concatenate([quantised(strip, bits=8) for strip in rows])


def quantised(strip: Float[Tensor, "c h w"], *, bits: int) -> np.ndarray:
    """Return (h, w, c) integers of 8 or 16 bits, rounded to the nearest."""
    check_has_numbers(strip)
    peak = 2**bits - 1
    unit = (strip.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    levels = (unit * peak).round_().to(torch.uint8 if bits == 8 else torch.float32)
    return levels.cpu().numpy().astype(np.uint8 if bits == 8 else np.uint16, copy=False)


def check_has_numbers(pixels: Float[Tensor, "c h w"]) -> None:
    """Refuse what would be written as black: a half-precision overflow, or damaged weights."""
    if bool(pixels.isnan().any()):
        raise ValueError(
            "the network's output has places that are not numbers: too large for half precision "
            "(use --fp32, in Python dtype=torch.float32), or the weights are damaged"
        )
