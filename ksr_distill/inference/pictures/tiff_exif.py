"""EXIF out of TIFFs and into them, which libvips leaves out in both directions.

A BigTIFF's first directory is written anew at the end of the file, with what describes the picture
added, and the header then points to it; no pixel moves (TIFF 6.0 §2, EXIF 2.32 §4.6, and the
BigTIFF layout of libtiff: counts and offsets of 8 bytes).
"""

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import pyvips
from PIL.TiffImagePlugin import ImageFileDirectory_v2

EXIF_POINTER, GPS_POINTER = 0x8769, 0x8825

DESCRIPTIVE = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x4746, 0x4749, 0x8298,
               0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F}  # fmt: skip
"""What of the first directory says something about the picture (description, camera, software,
date, artist, computer, ratings, copyright, Windows' fields); the rest says how a file is laid out.
"""

UNTRUE = {0xA002, 0xA003, 0xA005}
"""The source's size in pixels, and a pointer to what concerns its file."""

BYTES_PER_WORD = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 1, 7: 1, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8}
WORDS_PER_VALUE = {5: 2, 10: 2}
LONG8 = 16
TIFF_HEADER_BYTES = 8
BIG_TIFF_MAGIC, BIG_TIFF_HEADER_BYTES, BIG_TIFF_ROW_BYTES = 43, 16, 20


class Entry(NamedTuple):
    """One field of a directory: what it is, its type, how many values, and these as words."""

    tag: int
    kind: int
    count: int
    words: np.ndarray


def exif_fields(path: Path) -> Mapping[str, tuple[int, Any]]:
    """Return a TIFF's EXIF as libvips' metadata of a JPEG; nothing where it has none.

    Raises:
        ValueError: If a directory is damaged.
    """
    try:
        exif = _read_exif(path)
    except (struct.error, SyntaxError, LookupError, TypeError) as error:
        raise ValueError(f"has damaged EXIF ({error})") from error
    if exif is None:
        return {}
    carrier = io.BytesIO()
    PIL.Image.new("L", (1, 1)).save(carrier, "JPEG", exif=exif)
    parsed = pyvips.Image.new_from_buffer(carrier.getvalue(), "")
    return {
        name: (parsed.get_typeof(name), parsed.get(name))
        for name in parsed.get_fields()
        if name.startswith("exif-")
    }


def tiff_directory(file: BinaryIO, place: int | None = None) -> ImageFileDirectory_v2:
    """Return a directory, by default the first, without the pixels: Pillow opens fewer TIFFs."""
    file.seek(0)
    header = file.read(BIG_TIFF_HEADER_BYTES)
    if BIG_TIFF_MAGIC not in header[2:4]:
        header = header[:TIFF_HEADER_BYTES]
    fields = ImageFileDirectory_v2(header)
    file.seek(fields.next if place is None else place)
    fields.load(file)
    return fields


def _read_exif(path: Path) -> PIL.Image.Exif | None:
    """Return the descriptive fields."""
    exif = PIL.Image.Exif()
    with path.open("rb") as file:
        first = tiff_directory(file)
        exif.update({tag: value for tag, value in first.items() if tag in DESCRIPTIVE})
        pointers = [pointer for pointer in (EXIF_POINTER, GPS_POINTER) if pointer in first]
        for pointer in pointers:
            fields = tiff_directory(file, first[pointer])
            exif.get_ifd(pointer).update({k: v for k, v in fields.items() if k not in UNTRUE})
    return exif if exif or pointers else None


def add_exif(path: Path, exif: bytes) -> None:
    """Add an EXIF block's description of the picture to a BigTIFF.

    Raises:
        ValueError: If the block is damaged; the file is then as it was.
    """
    try:
        fields, sub_directories = _parse(exif.removeprefix(b"Exif\0\0"))
    except (struct.error, LookupError, ValueError) as error:
        raise ValueError(f"has damaged EXIF ({error})") from error
    with path.open("r+b") as file:
        header = file.read(BIG_TIFF_HEADER_BYTES)
        order = _byte_order(header)
        (directory,) = struct.unpack(order + "Q", header[8:])
        file.seek(directory)
        (count,) = struct.unpack(order + "Q", file.read(8))
        rows = [file.read(BIG_TIFF_ROW_BYTES) for _ in range(count)]
        following = file.read(8)
        present = {struct.unpack(order + "H", row[:2])[0] for row in rows}
        for pointer, entries in sub_directories.items():
            sub_rows = [_row(file, entry, order) for entry in entries]
            place = np.array([_append_directory(file, sub_rows, bytes(8), order)], np.uint64)
            fields.append(Entry(pointer, LONG8, 1, place))
        rows += [_row(file, entry, order) for entry in fields if entry.tag not in present]
        directory = _append_directory(file, rows, following, order)
        file.seek(8)
        file.write(struct.pack(order + "Q", directory))


def _parse(block: bytes) -> tuple[list[Entry], dict[int, list[Entry]]]:
    """Return the first directory's descriptive fields, and the EXIF and GPS directories."""
    order = _byte_order(block)
    (start,) = struct.unpack_from(order + "L", block, 4)
    first = _directory(block, start, order)
    places = {entry.tag: int(entry.words[0]) for entry in first if entry.kind == 4}
    sub_directories = {
        pointer: [e for e in _directory(block, places[pointer], order) if e.tag not in UNTRUE]
        for pointer in (EXIF_POINTER, GPS_POINTER)
        if pointer in places
    }
    fields = [entry for entry in first if entry.tag in DESCRIPTIVE]
    return fields, {pointer: entries for pointer, entries in sub_directories.items() if entries}


def _directory(block: bytes, start: int, order: str) -> list[Entry]:
    (count,) = struct.unpack_from(order + "H", block, start)
    return [_entry(block, start + 2 + 12 * i, order) for i in range(count)]


def _entry(block: bytes, place: int, order: str) -> Entry:
    tag, kind, count = struct.unpack_from(order + "HHL", block, place)
    num_words = count * WORDS_PER_VALUE.get(kind, 1)
    place += 8
    if num_words * BYTES_PER_WORD[kind] > 4:
        (place,) = struct.unpack_from(order + "L", block, place)
    words = np.frombuffer(block, f"{order}u{BYTES_PER_WORD[kind]}", num_words, place)
    return Entry(tag, kind, count, words)


def _row(file: BinaryIO, entry: Entry, order: str) -> bytes:
    """Return a BigTIFF directory's row; values that do not fit into it go to the file's end."""
    data = entry.words.astype(f"{order}u{entry.words.itemsize}").tobytes()
    if len(data) > 8:
        data = struct.pack(order + "Q", _append(file, data))
    return struct.pack(order + "HHQ", entry.tag, entry.kind, entry.count) + data.ljust(8, b"\0")


def _append_directory(file: BinaryIO, rows: list[bytes], following: bytes, order: str) -> int:
    rows = sorted(rows, key=lambda row: struct.unpack(order + "H", row[:2]))
    return _append(file, struct.pack(order + "Q", len(rows)) + b"".join(rows) + following)


def _append(file: BinaryIO, data: bytes) -> int:
    """Write at the end, at a multiple of 8 bytes; return where."""
    end = file.seek(0, io.SEEK_END)
    start = -(-end // 8) * 8
    file.write(bytes(start - end) + data)
    return start


def _byte_order(header: bytes) -> str:
    return {b"II": "<", b"MM": ">"}[header[:2]]
