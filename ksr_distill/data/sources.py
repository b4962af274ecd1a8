"""Photo files, and what each becomes in a shard. Imports no torch: packing starts processes."""

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ksr_distill.data.pictures import (
    PICTURE_ERRORS,
    encode_lossless,
    measure_sharpness,
    open_photo,
    picture_suffixes,
)

SUFFIX_OF_FORMAT = {"JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class PackOptions:
    """What decides the content of the shards: the same options make the same bytes.

    Attributes:
        val_fraction: Share of the files that go to validation, by hash of their path.
        val_patterns: Instead of a share: files whose path (in the folder) matches one of these.
        min_side_px: Shorter pictures are left out.
        min_sharpness: Pictures (or tiles) below this variance of the Laplacian are left out.
        tile_px: Cut pictures to tiles of this side, the margins lost; None keeps them whole.
        shard_files: Source files per shard.
        reduced_to: Pack each training photo also at these shares of its size: small copies are
            sharper than their photo, and free of its JPEG blocks.
    """

    val_fraction: float
    val_patterns: tuple[str, ...]
    min_side_px: int
    min_sharpness: float
    tile_px: int | None
    shard_files: int
    reduced_to: tuple[float, ...] = ()


class SourceFile(NamedTuple):
    """A file to pack: its path in the folder, with forward slashes, and its size."""

    path: str
    size: int

    @property
    def digest(self) -> bytes:
        """A hash of the path: it orders files and splits them, whatever else lies in the folder."""
        return hashlib.sha256(self.path.encode("utf-8", "surrogateescape")).digest()


class PackedPicture(NamedTuple):
    """A member to be written."""

    key: str
    suffix: str
    content: bytes
    crc32: int
    width: int
    height: int


class PackedPhoto(NamedTuple):
    """What became of a file: its pictures (several, if tiled), and why something was left out."""

    pictures: tuple[PackedPicture, ...]
    skipped: tuple[tuple[str, str], ...]


def find_photos(folder: Path) -> list[SourceFile]:
    """Return the picture files below a folder (by suffix, hidden ones not), in order of their hash.

    Raises:
        ValueError: If there are none.
    """
    suffixes = picture_suffixes()
    found = [
        SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size if path.exists() else 0)
        for path in _walk(folder)
        # A link to nothing is left out later, with a reason; reading a pipe would not end.
        if path.suffix.lower() in suffixes and (path.is_file() or path.is_symlink())
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no pictures; give a folder with photos "
            f"({', '.join(sorted(suffixes & {'.jpg', '.png', '.tif', '.webp'}))}, …)"
        )
    return sorted(found, key=lambda file: file.digest)


def is_validation(file: SourceFile, options: PackOptions) -> bool:
    """Return whether a file is for validation: a function of its path and the options alone."""
    if options.val_patterns:
        return any(fnmatch(file.path, pattern) for pattern in options.val_patterns)
    return int.from_bytes(file.digest[-8:], "big") < options.val_fraction * 2**64


def pack_photo(folder: Path, options: PackOptions, path: str) -> PackedPhoto:
    """Return what a file and its reduced copies become; a broken file becomes a reason."""
    try:
        content = (folder / path).read_bytes()
        image, kept_format = open_photo(content)
    except PICTURE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return PackedPhoto((), ((path, f"broken: {_without_address(reason)}"),))
    packed = [_pack_picture(image, path, options, content, kept_format)]
    reductions = () if is_validation(SourceFile(path, 0), options) else options.reduced_to
    for share in reductions:
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        copy = image.resize(size, Image.Resampling.LANCZOS)
        packed.append(_pack_picture(copy, f"{path}@{share:g}", options, b"", None))
    return PackedPhoto(
        tuple(picture for photo in packed for picture in photo.pictures),
        tuple(reason for photo in packed for reason in photo.skipped),
    )


def _pack_picture(
    image: Image.Image, path: str, options: PackOptions, content: bytes, kept_format: str | None
) -> PackedPhoto:
    if min(image.size) < options.min_side_px:
        size = f"{image.width}×{image.height}"
        return PackedPhoto((), ((path, f"{size} is smaller than {options.min_side_px} px"),))
    if options.tile_px is not None:
        return _pack_tiles(image, path, options.tile_px, options.min_sharpness)
    if (
        options.min_sharpness > 0
        and (sharpness := measure_sharpness(image)) < options.min_sharpness
    ):
        reason = f"sharpness {sharpness:.1f} is below {options.min_sharpness:g}"
        return PackedPhoto((), ((path, reason),))
    if kept_format is not None:
        suffix = SUFFIX_OF_FORMAT[kept_format]
        return PackedPhoto((_packed(member_key(path), suffix, content, image),), ())
    suffix, content = encode_lossless(image)
    return PackedPhoto((_packed(member_key(path), suffix, content, image),), ())


def member_key(path: str) -> str:
    """Return a file's key in its shard: readable, unique by a hash, safe as a file name."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", str(PurePosixPath(path).with_suffix("")))
    return f"{readable[-60:]}-{SourceFile(path, 0).digest.hex()[:12]}"


def _pack_tiles(image: Image.Image, path: str, tile_px: int, min_sharpness: float) -> PackedPhoto:
    columns, rows = image.width // tile_px, image.height // tile_px
    left, top = (image.width - columns * tile_px) // 2, (image.height - rows * tile_px) // 2
    if not columns * rows:
        reason = f"{image.width}×{image.height} is smaller than a tile of {tile_px} px"
        return PackedPhoto((), ((path, reason),))
    pictures = []
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * tile_px, top + row * tile_px
            tile = image.crop((x, y, x + tile_px, y + tile_px))
            if min_sharpness <= 0 or measure_sharpness(tile) >= min_sharpness:
                suffix, content = encode_lossless(tile)
                pictures.append(_packed(f"{member_key(path)}-y{y}-x{x}", suffix, content, tile))
    dropped = rows * columns - len(pictures)
    reason = f"{dropped} of {rows * columns} tiles: sharpness below {min_sharpness:g}"
    return PackedPhoto(tuple(pictures), ((path, reason),) if dropped else ())


def _packed(key: str, suffix: str, content: bytes, image: Image.Image) -> PackedPicture:
    return PackedPicture(key, suffix, content, zlib.crc32(content), image.width, image.height)


def _without_address(reason: str) -> str:
    # Pillow names the object in memory; a report must be the same in every run.
    return re.sub(r" <_io\.\w+ object at 0x[0-9a-f]+>", "", reason)


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))
