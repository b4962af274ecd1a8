import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import pytest
import pyvips
import torch

from ksr_distill.inference.pictures.images import alphas, as_rasters, upright_image, visible_colour
from ksr_distill.inference.pictures.rasters import Window
from ksr_distill.inference.pictures.reading import bleed

RGBA = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)


def with_a_hole(rgba, kind):
    rgba = rgba.copy()
    if kind == "hole":
        rgba[10:45, 15:60, 3] = 0
    elif kind == "far away":
        rgba[:, 3:, 3] = 0
    else:
        rgba[..., 3] = {"opaque": 255, "gone": 0}[kind]
    return rgba


@pytest.mark.parametrize("kind", ["hole", "far away", "opaque", "gone"])
def test_pictures_in_memory_bleed_as_files_do(kind):
    rgba = with_a_hole(RGBA, kind)
    image = pyvips.Image.new_from_array(rgba)
    of_files = bleed(image.extract_band(0, n=3), image.extract_band(3), 255.0).numpy()
    unit = torch.from_numpy(rgba).permute(2, 0, 1).float() / 255
    in_memory = (visible_colour(unit[:3], unit[3:]) * 255).round().permute(1, 2, 0).numpy()
    difference = np.abs(in_memory - of_files)
    assert difference.max() <= 1
    if kind == "hole":
        assert np.abs(of_files[30, 40].astype(int) - rgba[30, 40, :3]).max() > 1  # it did bleed


def signed(image):
    """Return what the network would see."""
    (raster,) = as_rasters(image)
    return raster.read(Window(0, 0, raster.height, raster.width))


WIDE = np.array([[0, 257, 65535]], np.uint16)


@pytest.mark.parametrize(
    "image",
    [
        np.dstack([WIDE] * 3),
        np.dstack([WIDE] * 3).astype(">u2"),
        torch.from_numpy(WIDE).expand(3, 1, 3),
        PIL.Image.fromarray(WIDE),
        PIL.Image.fromarray(WIDE.astype(np.int32)),
    ],
    ids=["numpy", "big-endian", "torch", "I;16", "I"],
)
def test_sixteen_bits_span_their_range_in_whatever_holds_them(image):
    pixels = signed(image)
    np.testing.assert_allclose(pixels, np.broadcast_to([[[-1, 2 / 255 - 1, 1]]], (3, 1, 3)))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32", "uint64"])
def test_integers_that_do_not_say_what_is_white_are_refused(dtype):
    message = rf"image has dtype (torch\.)?{dtype}; convert it to uint8 or uint16"
    for image in (np.zeros((4, 4, 3), dtype), torch.zeros(3, 4, 4, dtype=getattr(torch, dtype))):
        with pytest.raises(ValueError, match=message):
            as_rasters(image)


@pytest.mark.parametrize("value", [-1, 65536])
def test_mode_i_is_refused_beyond_sixteen_bits(value):
    image = PIL.Image.fromarray(np.array([[0, value]], np.int32))
    with pytest.raises(ValueError, match=rf"mode I with values .*{value}.*16-bit grey, 0…65535"):
        as_rasters(image)


def test_mode_i_is_not_guessed_from_its_values():
    image = PIL.Image.fromarray(np.array([[0, 255]], np.int32))
    assert signed(image).max() == pytest.approx(2 * 255 / 65535 - 1)


def test_sixteen_bits_with_a_transparent_value_keep_their_bits(tmp_path):
    image = PIL.Image.fromarray(np.array([[1000, 1000, 3000]], np.uint16))
    image.save(tmp_path / "in.png", transparency=3000)
    image = PIL.Image.open(tmp_path / "in.png")
    assert signed(image)[:, 0, :2].numpy() == pytest.approx(2 * 1000 / 65535 - 1)
    (alpha,) = alphas(image)
    assert alpha.read(Window(0, 0, 1, 3)).tolist() == [[[1, 1, -1]]]


def test_mode_f_is_refused_and_says_what_to_give():
    image = PIL.Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(ValueError, match=r"mode F.*; give an array of uint8") as error:
        as_rasters(image)
    assert "\n" not in str(error.value)


def test_the_name_of_a_file_is_no_picture():
    unchecked = getattr(as_rasters, "__wrapped__", as_rasters)  # outside tests nobody checks types
    with pytest.raises(ValueError, match="image is str; give a PIL image"):
        unchecked("photo.jpg")


@pytest.mark.parametrize("orientation", range(9))
def test_every_orientation_is_turned_as_pillow_does(orientation):
    image = PIL.Image.fromarray(RGBA[..., :3])
    image.getexif()[0x0112] = orientation
    expected = PIL.ImageOps.exif_transpose(image)
    assert upright_image(image).tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_file_that_pillow_opens_is_turned_once(tmp_path, suffix, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    PIL.Image.fromarray(RGBA[..., :3]).save(path, exif=exif)
    with PIL.Image.open(path) as image, PIL.Image.open(path) as again:
        expected = PIL.ImageOps.exif_transpose(again)
        turned = upright_image(image)
        assert turned.size == expected.size
        assert turned.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [("exif", b"no exif"), ("Raw profile type exif", "\nexif\n  2\nno hexadecimals\n")],
)
def test_damaged_exif_turns_nothing(name, content):
    image = PIL.Image.fromarray(RGBA[..., :3])
    image.info[name] = content
    assert upright_image(image) is image


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_pil_image_is_turned_as_its_exif_says(pipeline, mode):
    image = PIL.Image.fromarray(RGBA[:10, :16]).convert(mode)
    turned = image.transpose(PIL.Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown turned back by 90°
    results = [
        pipeline(one, generator=torch.Generator().manual_seed(0)).images[0]
        for one in (image, turned)
    ]
    assert results[0].size == results[1].size == (32, 20)
    assert results[0].tobytes() == results[1].tobytes()


def test_a_pil_images_rgb_profile_goes_with_it_and_no_other(pipeline):
    rgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    grey = rgb[:16] + b"GRAY" + rgb[20:]
    images = [PIL.Image.fromarray(RGBA[:10, :16]).convert(mode) for mode in ("RGB", "L", "CMYK")]
    for image, profile in zip(images, (rgb, grey, rgb), strict=True):
        image.info["icc_profile"] = profile
    bare = RGBA[:10, :16, :3]
    results = pipeline([*images, bare]).images
    assert [result.info.get("icc_profile") for result in results] == [rgb, None, None, None]
