"""The colours of TIFFs that libvips hands over as they are stored, or not at all."""

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from jaxtyping import Float64

from ksr_distill.inference.pictures.tiff_exif import tiff_directory

BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 258, 259, 262, 277
LUMA, SUBSAMPLING, REFERENCE = 529, 530, 532
YCBCR, CIELAB = 6, 8
UNREAD = {9: "ICCLab", 10: "ITULab"}

COLOURLESS_CODECS = {1, 5, 8, 32773, 32946, 34925, 50000}
"""None, LZW, Deflate, PackBits, Deflate's old number, LZMA, Zstandard. The decoders of JPEG and
JPEG 2000 return RGB by themselves."""


def tiff_tags(path: Path) -> Mapping[int, Any]:
    """Return the fields of a TIFF's first picture.

    Raises:
        ValueError: If they are damaged.
    """
    try:
        # Pillow warns of what is damaged, and then fails: one line is enough.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            return dict(tiff_directory(file))
    except (struct.error, SyntaxError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a picture: damaged fields ({error})") from error


def is_8_bit_lab(tags: Mapping[int, Any]) -> bool:
    """Tell whether libvips would refuse it: of 8 bits, it knows its own packed CIELab alone."""
    return tags.get(PHOTOMETRIC) == CIELAB and set(tags.get(BITS, ())) == {8}


def as_rgb(path: Path, image: pyvips.Image, tags: Mapping[int, Any]) -> pyvips.Image:
    """Return a TIFF as libvips decoded it, with YCbCr turned into RGB.

    libvips does that itself only where a decoder of JPEG does, or where the colours are
    subsampled: then libtiff does, and adds an opaque band.

    Raises:
        ValueError: If there are no three bands, the fields of YCbCr are damaged, or it is Lab of
            a kind that libvips takes for RGB.
    """
    if tags.get(PHOTOMETRIC) in UNREAD:
        raise ValueError(
            f"{path} has {UNREAD[tags[PHOTOMETRIC]]} colours; grey, RGB, CMYK, YCbCr and CIELab "
            "TIFFs are read, convert it to RGB first"
        )
    if tags.get(PHOTOMETRIC) != YCBCR or tags.get(COMPRESSION, 1) not in COLOURLESS_CODECS:
        return image
    if tags.get(SAMPLES) != 3 or image.format not in ("uchar", "ushort"):
        raise ValueError(
            f"{path} has {tags.get(SAMPLES)} × {image.format} samples of YCbCr a pixel; 3 with 8 "
            "or 16 bits are read, convert it to RGB first"
        )
    if image.bands == 4:
        return image.extract_band(0, n=3)
    peak = 255 if image.format == "uchar" else 65535
    try:
        matrix, offset = ycbcr_to_rgb(tags, peak)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} has damaged fields of YCbCr ({error}); convert it to RGB first"
        ) from error
    rgb = image.recomb(matrix.tolist()) + offset.tolist()
    return rgb.rint().cast(image.format)


def ycbcr_to_rgb(
    tags: Mapping[int, Any], peak: int
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "3"]]:
    """Return what stored samples are multiplied by, and what is then added (TIFF 6.0, §20, §21)."""
    half = (peak + 1) // 2
    red, green, blue = map(float, tags.get(LUMA, (0.299, 0.587, 0.114)))
    reference = np.array(tags.get(REFERENCE, (0, peak, half, peak, half, peak)), np.float64)
    black, white = reference.reshape(3, 2).T
    from_red, from_blue = 2 - 2 * red, 2 - 2 * blue
    with np.errstate(all="raise"):
        full_range = np.array([peak, peak - half, peak - half]) / (white - black)
        matrix = full_range * [
            [1, 0, from_red],
            [1, -blue * from_blue / green, -red * from_red / green],
            [1, from_blue, 0],
        ]
    if not np.isfinite(matrix).all():
        raise ValueError("they are not numbers")
    return matrix, -matrix @ black
