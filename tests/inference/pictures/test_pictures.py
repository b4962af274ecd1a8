import os
import signal
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import pyvips
import torch

from ksr_distill.inference.pictures.rasters import ResampledRaster, TensorRaster, Window
from ksr_distill.inference.pictures.reading import _without_pillows_limit, open_picture
from ksr_distill.inference.pictures.writing import (
    PngStream,
    check_target,
    format_of,
    write_picture,
)

RGB = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
ICC = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()


def doubled(source, target, name="png", bits=None):
    """Write the picture bicubically enlarged: what happens beside the network."""
    picture = open_picture(source)
    raster = ResampledRaster(picture.colour, picture.height * 2, picture.width * 2)
    write_picture(raster, picture, target, name=name, bits=bits or picture.bits)
    return picture


def whole(raster):
    return raster.read(Window(0, 0, raster.height, raster.width))


@pytest.mark.parametrize(
    ("mode", "is_grey", "has_alpha"),
    [("RGB", False, False), ("L", True, False), ("P", False, False), ("RGBA", False, True),
     ("LA", True, True), ("1", True, False)],
)  # fmt: skip
def test_every_mode_comes_back_as_what_it_was(tmp_path, mode, is_grey, has_alpha):
    image = PIL.Image.fromarray(RGB).convert(mode)
    if has_alpha:
        image.putalpha(PIL.Image.fromarray(RGB[..., 0]))
    image.save(tmp_path / "in.png")
    picture = doubled(tmp_path / "in.png", tmp_path / "out.png")
    assert (picture.is_grey, picture.alpha is not None) == (is_grey, has_alpha)
    written = PIL.Image.open(tmp_path / "out.png")
    assert written.size == (60, 80)
    expected = {
        (True, False): "L",
        (True, True): "LA",
        (False, False): "RGB",
        (False, True): "RGBA",
    }
    assert written.mode == expected[is_grey, has_alpha]


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tga", "gif", "webp", "tif", "jpg"])
def test_every_format_is_read_upright(tmp_path, suffix):
    image = PIL.Image.fromarray(RGB)
    image.save(tmp_path / f"in.{suffix}")
    picture = open_picture(tmp_path / f"in.{suffix}")
    assert (picture.height, picture.width) == (40, 30)
    expected = np.asarray(PIL.Image.open(tmp_path / f"in.{suffix}").convert("RGB")) / 127.5 - 1
    difference = whole(picture.colour).permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).mean() < 0.02  # two decoders of JPEG and WebP


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_stay_sixteen(tmp_path, bands, suffix):
    values = np.random.default_rng(1).integers(0, 65536, (20, 16, bands)).astype(np.uint16)
    source = pyvips.Image.new_from_array(values.squeeze())
    source = source.copy(interpretation="grey16" if bands == 1 else "rgb16")
    source.write_to_file(str(tmp_path / f"in.{suffix}"))
    picture = open_picture(tmp_path / f"in.{suffix}")
    assert picture.bits == 16
    write_picture(picture.colour, picture, tmp_path / f"out.{suffix}", name=suffix, bits=16)
    written = pyvips.Image.new_from_file(str(tmp_path / f"out.{suffix}")).numpy()
    np.testing.assert_array_equal(written.reshape(values.shape), values)


def test_a_16_bit_pgm_is_not_clipped_to_white_and_larger_numbers_are_refused(tmp_path):
    grey = RGB[..., 0].astype(np.uint16) * 257
    PIL.Image.fromarray(grey).save(tmp_path / "in.pgm")
    picture = doubled(tmp_path / "in.pgm", tmp_path / "out.png")
    assert (picture.bits, picture.is_grey) == (16, True)
    np.testing.assert_allclose((whole(picture.colour)[0] + 1) / 2, grey / 65535, atol=1e-6)
    PIL.Image.fromarray(grey.astype(np.float32)).save(tmp_path / "in.pfm")
    with pytest.raises(ValueError, match="1 × float samples a pixel"):
        open_picture(tmp_path / "in.pfm")


def test_one_broken_file_leaves_nothing_in_the_error_of_the_next(tmp_path, recwarn):
    PIL.Image.fromarray(RGB).save(tmp_path / "a.tif")
    PIL.Image.fromarray(RGB).save(tmp_path / "b.jpg")
    for name in ("a.tif", "b.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as a picture"):
        open_picture(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read as a picture") as error:
        open_picture(tmp_path / "b.jpg")
    assert "a.tif" not in str(error.value)
    assert list(recwarn) == []


def test_an_opaque_picture_is_returned_to_the_bit(tmp_path):
    PIL.Image.fromarray(RGB).save(tmp_path / "in.png")
    picture = open_picture(tmp_path / "in.png")
    write_picture(picture.colour, picture, tmp_path / "out.png", name="png", bits=8)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "out.png")), RGB)


def test_threads_that_read_pictures_leave_pillow_its_limit():
    limit = PIL.Image.MAX_IMAGE_PIXELS

    def seen(number):
        with _without_pillows_limit():
            time.sleep(0.02 * (1 + number))
            return PIL.Image.MAX_IMAGE_PIXELS

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(seen, range(3))) == [None] * 3
    assert limit == PIL.Image.MAX_IMAGE_PIXELS


def test_transparency_brings_no_dark_fringe(tmp_path):
    rgba = np.zeros((40, 40, 4), np.uint8)  # black hides under the transparent half
    rgba[:, :20] = (230, 200, 40, 255)
    PIL.Image.fromarray(rgba).save(tmp_path / "in.png")
    doubled(tmp_path / "in.png", tmp_path / "out.png")
    written = np.asarray(PIL.Image.open(tmp_path / "out.png"))
    visible = written[written[..., 3] > 0]
    assert np.abs(visible[:, :3].astype(int) - (230, 200, 40)).max() <= 1
    assert written[:, :36, 3].min() == 255
    assert written[:, 44:, 3].max() == 0


def test_transparency_goes_to_the_device_that_the_colour_is_on(monkeypatch):
    class OnADevice:  # a single tile stays on its GPU
        height, width = 2, 3

        def read(self, window):
            return torch.zeros(3, window.height, window.width, device="meta")

    def levels(strip, *, bits):
        assert (strip.device.type, strip.shape, bits) == ("meta", (4, 2, 3), 8)
        return np.zeros((2, 3, 4), np.uint8)

    monkeypatch.setattr("ksr_distill.inference.pictures.writing.quantised", levels)
    alpha = TensorRaster(torch.ones(1, 2, 3))
    stream = PngStream(OnADevice(), alpha, bits=8, is_grey=False)
    assert stream._rows(Window(0, 0, 2, 3)) == bytes(2 * (1 + 3 * 4))


def test_a_wholly_transparent_picture_stays_one(tmp_path):
    PIL.Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "in.png")
    doubled(tmp_path / "in.png", tmp_path / "out.png")
    assert np.asarray(PIL.Image.open(tmp_path / "out.png"))[..., 3].max() == 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_profile_and_exif_are_kept_and_orientation_is_applied(tmp_path, suffix):
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    PIL.Image.fromarray(RGB).save(tmp_path / "in.jpg", quality=95, icc_profile=ICC, exif=exif)
    doubled(tmp_path / "in.jpg", tmp_path / f"out.{suffix}", name=suffix)
    written = PIL.Image.open(tmp_path / f"out.{suffix}")
    assert written.size == (80, 60)  # turned
    assert written.getexif().get(0x0112, 1) == 1  # and not to be turned again
    assert written.getexif()[0x010E] == "a description"
    assert written.info["icc_profile"] == ICC


@pytest.mark.parametrize("suffix", ["gif", "webp", "tga", "avif", "ppm", "tif", "jpg", "png"])
def test_a_picture_without_a_resolution_gets_what_exif_says(tmp_path, suffix):
    PIL.Image.fromarray(RGB).save(tmp_path / f"in.{suffix}")
    doubled(tmp_path / f"in.{suffix}", tmp_path / "out.png")
    assert PIL.Image.open(tmp_path / "out.png").info["dpi"] == pytest.approx((72, 72), abs=0.1)


@pytest.mark.parametrize(
    "field", [b'<d tiff:Orientation="6"/>', b"<d><tiff:Orientation>6</tiff:Orientation></d>"]
)
@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
def test_xmp_says_as_exif_does_that_pixels_are_upright(tmp_path, suffix, field):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">' + field + b"</x:xmpmeta>"
    PIL.Image.fromarray(RGB).save(tmp_path / "in.jpg", exif=exif, xmp=xmp)
    doubled(tmp_path / "in.jpg", tmp_path / f"out.{suffix}", name=suffix)
    kept = pyvips.Image.new_from_file(str(tmp_path / f"out.{suffix}")).get("xmp-data")
    assert bytes(kept) == xmp.replace(b"6", b"1")


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png"])
def test_a_resolution_is_kept(tmp_path, suffix):
    PIL.Image.fromarray(RGB).save(tmp_path / f"in.{suffix}", dpi=(300, 150))
    doubled(tmp_path / f"in.{suffix}", tmp_path / "out.png")
    assert PIL.Image.open(tmp_path / "out.png").info["dpi"] == pytest.approx((300, 150), abs=0.1)


def test_cmyk_becomes_srgb(tmp_path):
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "in.jpg")
    red = whole(open_picture(tmp_path / "in.jpg").colour).mean((1, 2))
    assert red[0] > 0.4
    assert red[1:].max() < -0.3


def test_an_animation_is_its_first_frame_and_says_so(tmp_path):
    frames = [PIL.Image.fromarray(RGB), PIL.Image.fromarray(RGB[::-1])]
    frames[0].save(tmp_path / "in.webp", save_all=True, append_images=frames[1:], lossless=True)
    picture = open_picture(tmp_path / "in.webp")
    assert picture.notes == ("has 2 frames or pages; only the first is used",)
    assert (picture.height, picture.width) == (40, 30)


def test_an_animated_png_says_so_too(tmp_path):
    frames = [PIL.Image.fromarray(RGB), PIL.Image.fromarray(RGB[::-1])]
    frames[0].save(tmp_path / "in.png", save_all=True, append_images=frames[1:])
    notes = ("has 2 frames or pages; only the first is used",)
    assert open_picture(tmp_path / "in.png").notes == notes


def test_a_png_with_more_text_than_pillow_reads_is_a_picture(tmp_path):
    """Pillow refuses a text of more than a megabyte, as programs put their settings into."""
    PIL.Image.fromarray(RGB).save(tmp_path / "short.png")
    short = (tmp_path / "short.png").read_bytes()
    body = b"workflow\0\0" + zlib.compress(bytes(3_000_000))
    text = struct.pack(">I", len(body)) + b"zTXt" + body
    text += struct.pack(">I", zlib.crc32(b"zTXt" + body))
    end_of_header = 8 + 25
    (tmp_path / "in.png").write_bytes(short[:end_of_header] + text + short[end_of_header:])
    with pytest.raises(ValueError, match="too large"):
        PIL.Image.open(tmp_path / "in.png")
    assert open_picture(tmp_path / "in.png").notes == ()


def test_a_name_that_is_not_utf8_is_refused_in_plain_words(tmp_path):
    path = tmp_path / os.fsdecode(b"\xe9t\xe9.png")
    PIL.Image.fromarray(RGB).save(path)
    with pytest.raises(ValueError, match=r"has a name that is not UTF-8.*rename it"):
        open_picture(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pbm"])
def test_black_and_white_is_grey_in_every_format(tmp_path, suffix):
    PIL.Image.fromarray(RGB).convert("1").save(tmp_path / f"in.{suffix}")
    assert open_picture(tmp_path / f"in.{suffix}").is_grey


def upright_rgb(orientation):
    """Return what, turned as EXIF says, is RGB again."""
    turns = PIL.Image.Transpose
    undo = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    image = PIL.Image.fromarray(RGB)
    return image.transpose(undo[orientation]) if orientation in undo else image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    upright_rgb(orientation).save(tmp_path / "in.png", exif=exif)
    picture = open_picture(tmp_path / "in.png")
    write_picture(picture.colour, picture, tmp_path / "out.png", name="png", bits=8)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "out.png")), RGB)


def test_float_samples_are_refused_unless_they_are_linear_colour(tmp_path):
    grey = pyvips.Image.new_from_array(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    grey.write_to_file(str(tmp_path / "grey.tif"))
    with pytest.raises(ValueError, match=r"grey\.tif has 1 × float samples a pixel"):
        open_picture(tmp_path / "grey.tif")
    colour = pyvips.Image.new_from_array(RGB).colourspace("scrgb")
    colour.write_to_file(str(tmp_path / "colour.tif"))
    picture = open_picture(tmp_path / "colour.tif")
    assert picture.bits == 16
    difference = whole(picture.colour).permute(1, 2, 0).numpy() - (RGB / 127.5 - 1)
    assert np.abs(difference).max() < 0.01


def broken_files(folder):
    PIL.Image.fromarray(RGB).resize((300, 400)).save(folder / "whole.jpg")
    PIL.Image.fromarray(RGB).resize((300, 400)).save(folder / "whole.png")
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "text.png": b"no picture at all\n" * 20,
        "zero.png": b"",
        "bomb.png": bomb(50_000, 50_000),
    }


def bomb(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.jpg", "cannot be read as a picture"),
        ("truncated.png", "cannot be read as a picture"),
        ("text.png", "cannot be read as a picture: unknown format"),
        ("zero.png", "has zero bytes"),
        ("bomb.png", "2500 megapixels, more than 120.*--max-megapixels 2500"),
    ],
)
def test_what_is_no_whole_picture_is_refused_in_one_line(tmp_path, name, message):
    (tmp_path / name).write_bytes(broken_files(tmp_path)[name])
    with pytest.raises(ValueError, match=message) as caught:
        open_picture(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jpg", {"width": 65501}, "holds 65500 px a side, but the output is 65501×10"),
        ("webp", {"height": 16384}, "holds 16383 px a side"),
        ("jpg", {"bits": 16}, "--bits 16 does not fit --format jpg"),
        ("jpg", {"has_alpha": True}, "has no transparency"),
    ],
)
def test_a_format_refuses_what_it_cannot_hold(name, options, message):
    sizes = {"height": 10, "width": 10, "bits": 8, "has_alpha": False} | options
    with pytest.raises(ValueError, match=message):
        check_target(name, **sizes)


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"\.xcf cannot be written; use one of \.png"):
        format_of(tmp_path / "out.xcf")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    PIL.Image.fromarray(RGB).save(tmp_path / "in.png")
    picture = open_picture(tmp_path / "in.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.png").write_text("old")

    class Broken:
        height, width = 80, 60

        def read(self, window):
            if window.top + window.height == 80:
                raise OSError("the third row is lost")
            return torch.zeros(3, window.height, window.width)

    with pytest.raises(OSError, match="the third row is lost"):
        write_picture(Broken(), picture, tmp_path / "out" / "out.png", name="png", bits=8)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.png"]
    assert (tmp_path / "out" / "out.png").read_text() == "old"


@pytest.mark.parametrize("name", ["png", "jpg", "tif", "dz"])
def test_ctrl_c_while_a_file_is_written_ends_it_and_leaves_nothing(tmp_path, name):
    class Interrupted(ResampledRaster):
        def read(self, window):
            if window.top > 1000:
                signal.raise_signal(signal.SIGINT)
            return super().read(window)

    PIL.Image.fromarray(RGB).save(tmp_path / "in.png")
    picture = open_picture(tmp_path / "in.png")
    with pytest.raises(KeyboardInterrupt):
        write_picture(
            Interrupted(picture.colour, 3000, 600), picture, tmp_path / "out", name=name, bits=8
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_deepzoom_is_a_folder_with_a_page_that_fetches_nothing(tmp_path):
    PIL.Image.fromarray(RGB).resize((300, 400)).save(tmp_path / "in.png")
    doubled(tmp_path / "in.png", tmp_path / "zoom", name="dz")
    page = (tmp_path / "zoom" / "index.html").read_text()
    assert "http" not in page
    assert "fetch(" not in page
    assert '"width": 600, "height": 800' in page
    deepest = PIL.Image.open(tmp_path / "zoom" / "picture_files" / "10" / "0_0.jpg")
    assert deepest.size == (255, 255)  # 254 and the overlap
    assert PIL.Image.open(tmp_path / "zoom" / "picture_files" / "0" / "0_0.jpg").size == (1, 1)


def test_deepzoom_does_not_replace_a_strange_folder(tmp_path):
    PIL.Image.fromarray(RGB).save(tmp_path / "in.png")
    (tmp_path / "zoom").mkdir()
    (tmp_path / "zoom" / "thesis.txt").write_text("ten years")
    with pytest.raises(OSError, match="is a folder with other things in it"):
        doubled(tmp_path / "in.png", tmp_path / "zoom", name="dz")
    assert (tmp_path / "zoom" / "thesis.txt").exists()
