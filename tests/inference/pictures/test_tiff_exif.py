import logging
import struct

import numpy as np
import PIL.Image
import pytest
import pyvips

from ksr_distill.inference.pictures import writing
from ksr_distill.inference.pictures.reading import open_picture
from tests.inference.pictures.test_pictures import doubled

RGB = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
EXIF_POINTER, GPS_POINTER = 0x8769, 0x8825
EXIF = {0x829A: (1, 50), 0x8827: (100,), 0x9003: b"2020:01:01 00:00:00\0"}
GPS = {1: b"N\0", 2: (48, 1, 5, 1, 10, 1)}
KINDS = {0x829A: (5, 1), 0x8827: (3, 1), 0x9003: (2, 20), 0xA002: (4, 1), 1: (2, 2), 2: (5, 3),
         0x010E: (2, 14), 0x0112: (3, 1), EXIF_POINTER: (4, 1), GPS_POINTER: (4, 1)}  # fmt: skip


def directory(fields, start, order):
    """Return a classic TIFF's directory that begins at a place, with its values behind it."""
    rows, data, place = b"", b"", start + 2 + 12 * len(fields) + 4
    for tag, value in fields.items():
        kind, count = KINDS[tag]
        letter = {3: "H", 4: "L", 5: "L"}.get(kind)
        raw = struct.pack(f"{order}{len(value)}{letter}", *value) if letter else value
        if len(raw) > 4:
            raw, data = struct.pack(order + "L", place + len(data)), data + raw
        rows += struct.pack(order + "HHL", tag, kind, count) + raw.ljust(4, b"\0")
    return struct.pack(order + "H", len(fields)) + rows + bytes(4) + data


def exif_block(order):
    """Return an EXIF block in a byte order, made by hand."""
    first = {0x010E: b"a description\0", 0x0112: (1,), EXIF_POINTER: (0,), GPS_POINTER: (0,)}
    exif_start = 8 + len(directory(first, 8, order))
    exif = directory(EXIF | {0xA002: (300,)}, exif_start, order)
    first[EXIF_POINTER], first[GPS_POINTER] = (exif_start,), (exif_start + len(exif),)
    gps = directory(GPS, exif_start + len(exif), order)
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8)
    return b"Exif\0\0" + header + directory(first, 8, order) + exif + gps


def described(path):
    with PIL.Image.open(path) as image:
        exif = image.getexif()
        fields, place = exif.get_ifd(EXIF_POINTER), exif.get_ifd(GPS_POINTER)
    date, speed, seconds = (fields[tag] for tag in (0x9003, 0x8827, 0x829A))
    return exif[0x010E], date, speed, float(seconds), place[1], tuple(map(float, place[2]))


EXPECTED = ("a description", "2020:01:01 00:00:00", 100, 0.02, "N", (48.0, 5.0, 10.0))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("is_pyramid", [True, False])
def test_a_jpegs_exif_is_in_the_tiff_and_comes_back(tmp_path, monkeypatch, order, is_pyramid):
    monkeypatch.setattr(writing, "PYRAMID_ABOVE_PX", 1 if is_pyramid else 1 << 26)
    PIL.Image.fromarray(RGB).save(tmp_path / "in.jpg", exif=exif_block(order), quality=95)
    assert described(tmp_path / "in.jpg") == EXPECTED

    doubled(tmp_path / "in.jpg", tmp_path / "out.tif", name="tif")

    assert described(tmp_path / "out.tif") == EXPECTED
    with PIL.Image.open(tmp_path / "out.tif") as image:
        assert 0xA002 not in image.getexif().get_ifd(EXIF_POINTER)  # the size is another now
    as_jpeg = pyvips.Image.new_from_file(str(tmp_path / "in.jpg"))
    as_tiff = pyvips.Image.new_from_file(str(tmp_path / "out.tif"))
    assert abs(as_tiff.avg() - as_jpeg.avg()) < 1
    assert as_tiff.get_fields().count("n-subifds") == is_pyramid
    for suffix in ("png", "jpg", "tif"):
        doubled(tmp_path / "out.tif", tmp_path / f"again.{suffix}", name=suffix)
        assert described(tmp_path / f"again.{suffix}") == EXPECTED


def test_a_classic_tiffs_exif_is_read_whatever_its_pixels(tmp_path):
    """16-bit colour, which Pillow itself does not open."""
    wide = pyvips.Image.new_from_array(RGB.astype(np.uint16) * 257).copy(interpretation="rgb16")
    wide.set_type(pyvips.GValue.gstr_type, "image-description", "a description")
    wide.tiffsave(str(tmp_path / "in.tif"))
    picture = doubled(tmp_path / "in.tif", tmp_path / "out.png")
    assert picture.bits == 16
    assert picture.notes == ()
    assert PIL.Image.open(tmp_path / "out.png").getexif()[0x010E] == "a description"


def test_a_pointer_without_a_value_is_damaged_exif(tmp_path, caplog):
    block = exif_block("<")
    pointer = struct.pack("<HHL", EXIF_POINTER, 4, 1)
    assert pointer in block
    empty = block.replace(pointer, struct.pack("<HHL", EXIF_POINTER, 4, 0))
    PIL.Image.fromarray(RGB).save(tmp_path / "in.jpg", exif=empty)
    with caplog.at_level(logging.WARNING):
        doubled(tmp_path / "in.jpg", tmp_path / "out.tif", name="tif")
    assert "in.jpg has damaged EXIF" in caplog.text
    assert open_picture(tmp_path / "out.tif").width == 600


def test_damaged_exif_is_left_out_and_said(tmp_path, caplog):
    block = exif_block("<")
    PIL.Image.fromarray(RGB).save(tmp_path / "in.jpg", exif=block[:-20] + b"\xff" * 4)
    with caplog.at_level(logging.WARNING):
        doubled(tmp_path / "in.jpg", tmp_path / "out.tif", name="tif")
    assert "in.jpg has damaged EXIF" in caplog.text
    assert open_picture(tmp_path / "out.tif").width == 600
