"""Any picture file as a raster: what its mode, depth, orientation and profile say is respected."""

import math
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import PIL.Image
import pyvips
import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.inference.pictures.images import BLUR_SIGMAS_PX
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.pictures.tiff_colour import as_rgb, is_8_bit_lab, tiff_tags
from ksr_distill.inference.pictures.tiff_exif import exif_fields

DEFAULT_MAX_MEGAPIXELS = 120.0
"""Above any camera's; Pillow's own limit lets 689 MB pass without a word."""

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
            ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")  # fmt: skip
"""What a folder is searched for. A single file may have any name."""

UNKNOWN_RESOLUTION = 1.0
"""libvips' pixels per millimetre where a file names none: no file means 25.4 dpi."""

DEFAULT_RESOLUTION = 72 / 25.4
"""What EXIF 2.32 (§4.6.4, XResolution) designates then; libvips writes no PNG without one."""

TIFF_LOADER = b"VipsForeignLoadTiffFile"

_ONE_AT_A_TIME = Lock()

KEPT_METADATA = ("icc-profile-data", "exif-", "xmp-data", "iptc-data")


@dataclass(frozen=True)
class VipsRaster:
    """The bands of a vips image as values in [-1, 1]; it is decoded where it is read."""

    image: pyvips.Image
    peak: float
    channels: int = 3

    @property
    def height(self) -> int:
        """Rows."""
        return self.image.height

    @property
    def width(self) -> int:
        """Columns."""
        return self.image.width

    def read(self, window: Window) -> Float[Tensor, "c h w"]:
        """Return a window; one band stands for all channels.

        Raises:
            ValueError: If the file turns out to be broken here.
        """
        region = self.image.crop(window.left, window.top, window.width, window.height)
        try:
            array = region.numpy()
        except pyvips.Error as error:
            raise ValueError(f"the picture is broken: {in_one_line(error)}") from error
        array = array.reshape(window.height, window.width, -1).astype(np.float32)
        pixels = torch.from_numpy(array).permute(2, 0, 1) / self.peak * 2 - 1
        return pixels.expand(self.channels, -1, -1).contiguous()


@dataclass(frozen=True)
class Picture:
    """A picture file, ready to be read by windows.

    Attributes:
        colour: What the network sees: three channels. Transparent places carry the colour of
            what is next to them, so that nothing hidden bleeds into visible edges.
        alpha: One channel, or nothing.
        is_grey: Whether the file has one colour band.
        bits: 8 or 16.
        metadata: ICC profile, EXIF, XMP, IPTC, by libvips' names, with their types.
        resolution: Pixels per millimetre, across and down; 72 dpi where the file names none.
        notes: What the user should know, in one line each.
    """

    path: Path
    colour: VipsRaster
    alpha: VipsRaster | None
    is_grey: bool
    bits: int
    metadata: Mapping[str, tuple[int, Any]] = field(repr=False)
    resolution: tuple[float, float]
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Rows, upright."""
        return self.colour.height

    @property
    def width(self) -> int:
        """Columns, upright."""
        return self.colour.width


def open_picture(path: Path, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> Picture:
    """Return a picture, upright.

    Raises:
        ValueError: If the file is no picture, is broken, or is larger than the limit.
        OSError: If the file cannot be read.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has zero bytes; it is no picture")
    if not _is_utf8(path):
        raise ValueError(f"{path} has a name that is not UTF-8, as libvips wants it; rename it")
    pyvips.block_untrusted_set(True)
    try:
        image = _decoded(path, max_megapixels)
        notes = _notes(path, image)
        image = _plain(path, image.autorot())
        # Most formats decode as a whole at the first pixel: a broken file is found here.
        image.crop(0, 0, 1, 1).avg()
        return _as_picture(path, image, notes)
    except pyvips.Error as error:
        raise ValueError(f"{path} cannot be read as a picture: {in_one_line(error)}") from error


def _is_utf8(path: Path) -> bool:
    """Tell whether a path can be named in UTF-8: one from an old archive may be in Latin-1."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def upright(path: Path) -> pyvips.Image:
    """Return a file's image with its orientation applied, whatever its size."""
    return _decoded(path, math.inf).autorot()


def _decoded(path: Path, max_megapixels: float) -> pyvips.Image:
    """Return the file's image, from Pillow where libvips does not know the format (BMP, PPM, …)."""
    loader = _loader(path)
    tags = tiff_tags(path) if loader == TIFF_LOADER else {}
    if loader is None or is_8_bit_lab(tags):
        return _decoded_by_pillow(path, max_megapixels)
    image = pyvips.Image.new_from_file(str(path), access="random", fail_on="error")
    _check_size(path, image.width, image.height, max_megapixels)
    return as_rgb(path, image, tags)


def _loader(path: Path) -> bytes | None:
    """Return libvips' name of what would read a file; nothing where it knows no way."""
    name = pyvips.base.vips_lib.vips_foreign_find_load(str(path).encode())
    if name == pyvips.ffi.NULL:
        pyvips.vips_lib.vips_error_clear()  # else the next file's error begins with this one's
        return None
    return pyvips.ffi.string(name)


def _decoded_by_pillow(path: Path, max_megapixels: float) -> pyvips.Image:
    try:
        # Pillow warns of what is damaged, and then fails: one line is enough.
        silent = warnings.catch_warnings(action="ignore")
        with _without_pillows_limit(), silent, PIL.Image.open(path) as image:
            _check_size(path, *image.size, max_megapixels)
            if image.mode in ("I", "F"):
                return _of_wide_samples(np.asarray(image))
            if image.mode == "1":
                image = image.convert("L")  # noqa: PLW2901 - grey stays grey
            if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")  # noqa: PLW2901
            return pyvips.Image.new_from_array(np.asarray(image))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as a picture: unknown format") from error
    except (SyntaxError, OSError, struct.error) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _of_wide_samples(samples: np.ndarray) -> pyvips.Image:
    """Return samples of 32 bits as 16 where they are whole and fit: so Pillow reads a 16-bit PGM.

    Others are left as they are, to be refused by ``_plain``; ``convert`` would clip them to white.
    """
    fits = samples.dtype.kind == "i" and samples.min() >= 0 and samples.max() < 2**16
    return pyvips.Image.new_from_array(samples.astype(np.uint16) if fits else samples)


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Let ``_check_size`` alone say what is too large: it sees the size before a pixel is read.

    One thread at a time: Pillow's limit is the process's, and so are Python's filters of warnings.
    """
    with _ONE_AT_A_TIME:
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def in_one_line(error: pyvips.Error) -> str:
    """Return libvips' own words, without its line breaks and repetitions."""
    lines = dict.fromkeys(line.strip() for line in (error.detail or str(error)).splitlines())
    return "; ".join(line for line in lines if line) or "unknown format"


def _check_size(path: Path, width: int, height: int, max_megapixels: float) -> None:
    megapixels = width * height / 1e6
    if not megapixels <= max_megapixels:  # nor is "not a number" a limit
        raise ValueError(
            f"{path} has {width}×{height} = {megapixels:.0f} megapixels, more than "
            f"{max_megapixels:g}; if that is meant, use --max-megapixels {math.ceil(megapixels)}"
        )


def _notes(path: Path, image: pyvips.Image) -> tuple[str, ...]:
    fields = image.get_fields()
    num_pages = image.get("n-pages") if "n-pages" in fields else 1
    if "vips-loader" in fields and image.get("vips-loader") == "pngload":
        # libvips knows no APNG. What Pillow refuses (long texts, say) may be a whole picture yet.
        silent = warnings.catch_warnings(action="ignore")
        passing = suppress(OSError, SyntaxError, ValueError)
        with passing, _without_pillows_limit(), silent, PIL.Image.open(path) as png:
            num_pages = getattr(png, "n_frames", 1)
    if isinstance(num_pages, int) and num_pages > 1:
        return (f"has {num_pages} frames or pages; only the first is used",)
    return ()


def _plain(path: Path, image: pyvips.Image) -> pyvips.Image:
    """Return grey or RGB of 8 or 16 bits, with alpha if there was one."""
    if image.interpretation == "cmyk":
        # By the file's own profile, or libvips' generic one. The result is sRGB.
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk")
    elif image.interpretation in ("lab", "labs", "labq", "xyz", "lch", "hsv"):
        image = image.colourspace("srgb")
    elif image.interpretation == "scrgb":
        image = image.colourspace("rgb16")
    if image.format not in ("uchar", "ushort") or image.bands > 4:
        raise ValueError(
            f"{path} has {image.bands} × {image.format} samples a pixel; pictures of up to "
            "4 bands with 8 or 16 bits are read, convert it first"
        )
    return image


def _as_picture(path: Path, image: pyvips.Image, notes: tuple[str, ...]) -> Picture:
    bits = 8 if image.format == "uchar" else 16
    peak = float(2**bits - 1)
    colour, alpha = image, None
    if image.bands in (2, 4):
        colour = image.extract_band(0, n=image.bands - 1)
        band = image.extract_band(image.bands - 1)
        colour, alpha = bleed(colour, band, peak), VipsRaster(band, peak, channels=1)
    metadata = {
        name: (image.get_typeof(name), image.get(name))
        for name in image.get_fields()
        if name.startswith(KEPT_METADATA)
    }
    if _loader(path) == TIFF_LOADER:
        try:
            metadata |= exif_fields(path)
        except ValueError as error:
            notes = (*notes, f"{error}, which is left out")
    return Picture(
        path=path,
        colour=VipsRaster(colour, peak),
        alpha=alpha,
        is_grey=colour.bands == 1,
        bits=bits,
        metadata=metadata,
        resolution=_resolution(image),
        notes=notes,
    )


def _resolution(image: pyvips.Image) -> tuple[float, float]:
    if image.xres == image.yres == UNKNOWN_RESOLUTION:
        return DEFAULT_RESOLUTION, DEFAULT_RESOLUTION
    return image.xres, image.yres


def bleed(colour: pyvips.Image, alpha: pyvips.Image, peak: float) -> pyvips.Image:
    """Return the colour with wholly transparent places filled from the visible ones around them.

    Files often hide black there; a network that looks across the edge would draw a dark fringe.
    The fill is the premultiplied colour, blurred, over the blurred alpha.
    """
    if (alpha < 1).max() == 0:
        return colour  # nothing is wholly transparent
    opacity = alpha / peak
    premultiplied = colour * opacity
    visible = opacity.avg()
    fill = colour * 0
    if visible > 0:
        bands = [premultiplied.extract_band(i).avg() / visible for i in range(colour.bands)]
        fill = fill + bands
    for sigma in BLUR_SIGMAS_PX:
        near = opacity.gaussblur(sigma, precision="float")
        blurred = premultiplied.gaussblur(sigma, precision="float")
        fill = (near > 1e-3).ifthenelse(blurred / (near + 1e-6), fill)
    filled = (alpha > 0).ifthenelse(colour, fill.rint())
    return filled.cast(colour.format)
