"""Rasters to files: row by row, so that memory does not grow with the picture, and atomically."""

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch

from ksr_distill.durable import replacing
from ksr_distill.inference.pictures.deepzoom import check_replaceable, write_deepzoom
from ksr_distill.inference.pictures.images import quantised
from ksr_distill.inference.pictures.rasters import Raster, ResampledRaster, Window
from ksr_distill.inference.pictures.reading import Picture, in_one_line
from ksr_distill.inference.pictures.tiff_exif import add_exif

logger = logging.getLogger(__name__)

STRIP_PX = 1 << 17
"""Pixels blended at once, whatever the width. Four times as many cost 120 MB more (measured)."""

PYRAMID_ABOVE_PX = 1 << 26
"""TIFFs of more than 67 megapixels carry smaller copies of themselves: viewers open those first."""


XMP_ORIENTATION = re.compile(rb"""(\btiff:Orientation\s*(?:=\s*["']|>)\s*)[1-8](?=\s*["'<])""")
"""Some programs believe it before EXIF's (XMP specification part 2, §3.1, the tiff namespace)."""


@dataclass(frozen=True)
class Format:
    """A way to write.

    Attributes:
        suffixes: The first is used for new names. A DeepZoom is a folder and has none.
        max_side_px: What the format can hold.
        options: libvips' saver options.
    """

    suffixes: tuple[str, ...]
    max_side_px: int
    has_16_bits: bool
    has_alpha: bool
    options: dict[str, object]


FORMATS = {
    "png": Format((".png",), 2**31 - 1, True, True, {"compression": 6}),
    "jpg": Format((".jpg", ".jpeg"), 65500, False, False, {"Q": 95, "subsample_mode": "off"}),
    "webp": Format((".webp",), 16383, False, True, {"Q": 95}),
    "tif": Format(
        (".tif", ".tiff"),
        2**31 - 1,
        True,
        True,
        {"compression": "deflate", "predictor": "horizontal", "tile": True, "tile_width": 256,
         "tile_height": 256, "bigtiff": True},
    ),
    "dz": Format(("",), 2**31 - 1, False, True, {}),
}  # fmt: skip


def is_written(path: Path) -> bool:
    """Tell whether a path's suffix is that of a format of ours."""
    return bool(path.suffix) and any(path.suffix.lower() in f.suffixes for f in FORMATS.values())


def format_of(path: Path) -> str:
    """Return a path's format by its suffix."""
    for name, fmt in FORMATS.items():
        if path.suffix and path.suffix.lower() in fmt.suffixes:
            return name
    known = ", ".join(suffix for fmt in FORMATS.values() for suffix in fmt.suffixes if suffix)
    raise ValueError(f"{path}: {path.suffix or 'no suffix'} cannot be written; use one of {known}")


def check_target(name: str, *, height: int, width: int, bits: int, has_alpha: bool) -> None:
    """Refuse what a format cannot hold, with the number that it can."""
    fmt = FORMATS[name]
    if max(height, width) > fmt.max_side_px:
        remedy = "a smaller --scale" if name in ("tif", "png", "dz") else "--format tif, png or dz"
        raise ValueError(
            f"--format {name} holds {fmt.max_side_px} px a side, but the output is "
            f"{width}×{height}; use {remedy}"
        )
    if bits == 16 and not fmt.has_16_bits:
        raise ValueError(f"--bits 16 does not fit --format {name}; use png or tif, or --bits 8")
    if has_alpha and not fmt.has_alpha:
        raise ValueError(f"--format {name} has no transparency, the picture has; use png or tif")


def write_picture(raster: Raster, picture: Picture, target: Path, *, name: str, bits: int) -> None:
    """Write an enlarged picture with its source's transparency, profile and EXIF.

    Args:
        raster: The enlarged colour.
        picture: The source.
        target: Replaced when the whole picture is written, and only then.
        name: One of FORMATS.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    alpha = None
    if picture.alpha is not None:
        alpha = ResampledRaster(picture.alpha, raster.height, raster.width)
    stream = PngStream(raster, alpha, bits=bits, is_grey=picture.is_grey)
    check_replaceable(target)
    with replacing(target) as new:
        try:
            image = _with_metadata(stream.image(), picture)
            # libvips would swallow a Ctrl-C that comes while this thread is in it: its log calls
            # Python before it returns, and what is raised there goes nowhere.
            with ThreadPoolExecutor(1) as thread:
                saved = thread.submit(_save, image, new, name, title=target.name)
                try:
                    saved.result()
                except KeyboardInterrupt as error:
                    stream.stop(error)  # and leaving this block waits for the thread
                    raise
                finally:
                    del saved  # its error knows this frame: a circle that kept the file open
            if name == "tif":
                _add_exif(new, picture)
        except pyvips.Error as error:
            stream.raise_its_error()
            raise OSError(f"{target} cannot be written: {in_one_line(error)}") from error


class PngStream:
    """Rasters as the bytes of an uncompressed PNG, made while libvips reads them.

    libvips takes pixels from a stream only in a file format; of those PNG alone has grey, colour
    and transparency in 8 and 16 bits.
    """

    def __init__(self, raster: Raster, alpha: Raster | None, *, bits: int, is_grey: bool) -> None:
        self.raster = raster
        self.alpha = alpha
        self.bits = bits
        self.is_grey = is_grey
        self._error: BaseException | None = None
        self._bytes = self._stream()
        self._buffer = memoryview(b"")

    def image(self) -> pyvips.Image:
        """Return it as an image that is read once, from top to bottom."""
        source = pyvips.SourceCustom()
        source.on_read(self._read)
        return pyvips.Image.new_from_source(
            source, "", access="sequential", fail_on="error", unlimited=True
        )

    def raise_its_error(self) -> None:
        """Raise what went wrong while the rows were made, which libvips knows nothing about."""
        if self._error is not None:
            raise self._error

    def stop(self, error: BaseException) -> None:
        """End the image here, because of an error."""
        self._error = error

    def _read(self, length: int) -> bytes:
        try:
            self.raise_its_error()
            if not self._buffer:
                self._buffer = memoryview(next(self._bytes, b""))
        except BaseException as error:  # noqa: BLE001 - kept, and raised again by raise_its_error
            self._error = error
            return b""
        part, self._buffer = self._buffer[:length], self._buffer[length:]
        return bytes(part)

    def _stream(self) -> Iterator[bytes]:
        """Yield the file (PNG specification, third edition, §5 and §11)."""
        height, width = self.raster.height, self.raster.width
        colour_type = (0 if self.is_grey else 2) + (0 if self.alpha is None else 4)
        header = struct.pack(">IIBBBBB", width, height, self.bits, colour_type, 0, 0, 0)
        yield b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
        deflate = zlib.compressobj(level=0)
        rows_at_once = max(1, STRIP_PX // width)
        for top in range(0, height, rows_at_once):
            rows = self._rows(Window(top, 0, min(rows_at_once, height - top), width))
            yield _chunk(b"IDAT", deflate.compress(rows))
        yield _chunk(b"IDAT", deflate.flush()) + _chunk(b"IEND", b"")

    def _rows(self, window: Window) -> bytes:
        """Return rows as PNG wants them: a filter byte (0, none), then big-endian samples."""
        strip = self.raster.read(window)
        if self.is_grey:
            strip = strip.mean(dim=0, keepdim=True)
        if self.alpha is not None:
            strip = torch.cat([strip, self.alpha.read(window).to(strip.device)])
        samples = quantised(strip, bits=self.bits)
        samples = samples.astype(samples.dtype.newbyteorder(">")).reshape(window.height, -1)
        return np.pad(samples.view(np.uint8), ((0, 0), (1, 0))).tobytes()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _with_metadata(image: pyvips.Image, picture: Picture) -> pyvips.Image:
    image = image.copy(xres=picture.resolution[0], yres=picture.resolution[1])
    for name, (kind, value) in picture.metadata.items():
        kept: Any = upright_xmp(value) if name == "xmp-data" else value
        image.set_type(kind, name, kept)
    # The pixels are upright now. libvips writes this over what the EXIF block says.
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return image


def upright_xmp(xmp: bytes) -> bytes:
    """Return XMP whose orientation is that of upright pixels, as an attribute or an element."""
    return XMP_ORIENTATION.sub(rb"\g<1>1", bytes(xmp))


def _add_exif(tiff: Path, picture: Picture) -> None:
    """Copy the source's EXIF into a TIFF; a damaged block is left out, as libvips does it."""
    exif = picture.metadata.get("exif-data")
    if exif is None:
        return
    try:
        add_exif(tiff, bytes(exif[1]))
    except ValueError as error:
        logger.warning("%s %s, which is left out", picture.path, error)


def _save(image: pyvips.Image, path: Path, name: str, *, title: str) -> None:
    if name == "dz":
        return write_deepzoom(image, path, title=title)
    options = dict(FORMATS[name].options)
    if name == "tif" and image.width * image.height > PYRAMID_ABOVE_PX:
        options |= {"pyramid": True, "subifd": True}
    savers = {
        "png": image.pngsave,
        "jpg": image.jpegsave,
        "webp": image.webpsave,
        "tif": image.tiffsave,
    }
    return savers[name](str(path), **options)
