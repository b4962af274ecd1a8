import struct

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

from ksr_distill.inference.pictures.reading import open_picture
from ksr_distill.inference.pictures.tiff_colour import LUMA, REFERENCE, ycbcr_to_rgb
from tests.inference.pictures.test_pictures import whole

ROWS, COLUMNS = np.mgrid[0:40, 0:30]
RGB = np.stack([COLUMNS * 8, ROWS * 6, (COLUMNS + ROWS) * 3], 2).astype(np.uint8)
YCBCR = PIL.Image.fromarray(RGB).convert("YCbCr")


def levels(picture):
    return whole(picture.colour).permute(1, 2, 0).numpy() * 127.5 + 127.5


def stored(samples, *, size, bits=8, kind=6, subsampling=(1, 1)):
    """Return an uncompressed TIFF, of YCbCr by default, made by hand (TIFF 6.0, §2 and §21)."""
    width, height = size
    place = 8 + 2 + 11 * 12 + 4
    fields = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, place), (259, 3, 1, 1),
              (262, 3, 1, kind), (273, 4, 1, place + 6), (277, 3, 1, 3), (278, 3, 1, height),
              (279, 4, 1, len(samples)), (284, 3, 1, 1),
              (530, 3, 2, subsampling[0] + (subsampling[1] << 16))]  # fmt: skip
    rows = b"".join(struct.pack("<HHLL", *field) for field in fields)
    header = b"II*\0" + struct.pack("<LH", 8, len(fields))
    return header + rows + bytes(4) + struct.pack("<3H", bits, bits, bits) + samples


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_ycbcr_is_read_as_the_colours_that_it_stands_for(tmp_path, compression):
    YCBCR.save(tmp_path / "in.tif", compression=compression)
    picture = open_picture(tmp_path / "in.tif")
    assert np.abs(levels(picture) - RGB).mean() < 2  # 0.9 by its rounding; as stored, 59


def test_ycbcr_of_16_bits_is_as_fine_as_stored(tmp_path):
    samples = np.asarray(YCBCR).astype("<u2") * 257
    (tmp_path / "in.tif").write_bytes(stored(samples.tobytes(), size=(30, 40), bits=16))
    picture = open_picture(tmp_path / "in.tif")
    assert picture.bits == 16
    assert np.abs(levels(picture) - RGB).mean() < 1


def test_subsampled_ycbcr_gets_no_transparency(tmp_path):
    samples = bytes([76, 76, 76, 76, 85, 255])  # four of Y, one of Cb, one of Cr: red
    (tmp_path / "in.tif").write_bytes(stored(samples, size=(2, 2), subsampling=(2, 2)))
    picture = open_picture(tmp_path / "in.tif")
    assert picture.alpha is None
    assert np.abs(levels(picture) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 32}, "3 × uint samples of YCbCr"),
        ({"kind": 9}, "ICCLab"),
        ({"kind": 10}, "ITULab"),
    ],
)
def test_other_colours_are_refused_in_one_line(tmp_path, options, message):
    (tmp_path / "in.tif").write_bytes(stored(bytes(48), size=(2, 2), **options))
    with pytest.raises(ValueError, match=rf"in\.tif has {message}.*convert it to RGB") as error:
        open_picture(tmp_path / "in.tif")
    assert "\n" not in str(error.value)


def with_tags(path, tags, image=YCBCR):
    fields = ImageFileDirectory_v2()
    for tag, values in tags.items():
        fields.tagtype[tag] = 5
        fields[tag] = tuple(IFDRational(value, 1000) for value in values)
    image.save(path, tiffinfo=fields)
    return path


def test_coefficients_and_range_are_those_of_the_file():
    tags = {LUMA: (0.25, 0.5, 0.25), REFERENCE: (16, 235, 128, 240, 128, 240)}
    matrix, offset = ycbcr_to_rgb(tags, 255)
    # Full range: Y = 255, Cb = 0, Cr = 127. R = 255 + 1.5 · 127, B = 255, G = 255 − 0.75 · 127.
    np.testing.assert_allclose(matrix @ (235, 128, 240) + offset, (445.5, 159.75, 255))


def test_white_of_narrow_range_is_white(tmp_path):
    narrow = {REFERENCE: (16000, 235000, 128000, 240000, 128000, 240000)}
    white = PIL.Image.new("YCbCr", (4, 4), (235, 128, 128))
    path = with_tags(tmp_path / "in.tif", narrow, white)
    np.testing.assert_allclose(levels(open_picture(path)), 255)


@pytest.mark.parametrize("tags", [{LUMA: (299, 0, 114)}, {REFERENCE: (0,) * 6}, {LUMA: (1, 2)}])
def test_damaged_fields_of_ycbcr_are_one_line(tmp_path, tags):
    with pytest.raises(ValueError, match=r"in\.tif has damaged fields of YCbCr .*RGB") as error:
        open_picture(with_tags(tmp_path / "in.tif", tags))
    assert "\n" not in str(error.value)


def test_cielab_of_8_bits_is_read(tmp_path):
    profiles = [PIL.ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    image = PIL.ImageCms.profileToProfile(PIL.Image.fromarray(RGB), *profiles, outputMode="LAB")
    exif = PIL.Image.Exif()
    exif[0x010E] = "a description"
    image.save(tmp_path / "in.tif", exif=exif)
    picture = open_picture(tmp_path / "in.tif")
    assert np.abs(levels(picture) - RGB).mean() < 2
    assert "exif-ifd0-ImageDescription" in picture.metadata
    assert "icc-profile-data" not in picture.metadata  # it would say that RGB is Lab
