"""Finds a study's pictures by id, reads them as sRGB, brings both of a pair to one size."""

import io
from pathlib import Path
from typing import Literal

from PIL import Image, ImageCms, ImageFilter, ImageOps, UnidentifiedImageError

from ksr_distill.study.basket import Prompt

PictureFormat = Literal["jpeg", "png"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
EIGHT_BIT_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK")


def find_pictures(folder: Path, prompts: list[Prompt]) -> dict[str, Path]:
    """Return each id's picture: the folder must hold exactly one for every id, and no other.

    Raises:
        ValueError: A picture is missing, doubled, or belongs to no id of the basket.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give the folder with one picture for each id")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(
                f"{folder}: {found[path.stem].name} and {path.name} are both {path.stem!r}; "
                "keep one of them"
            )
        found[path.stem] = path
    ids = {prompt.id for prompt in prompts}
    missing = [prompt.id for prompt in prompts if prompt.id not in found]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(ids)} ids have no picture: {_first(missing)}; "
            f"name each picture ID.png ({', '.join(SUFFIXES[1:])} are read too)"
        )
    foreign = sorted(set(found) - ids)
    if foreign:
        raise ValueError(
            f"{folder}: {len(foreign)} pictures belong to no id of the basket: {_first(foreign)}; "
            "remove them, or add their prompts"
        )
    return found


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def read_rgb(path: Path) -> Image.Image:
    """Return the picture as an upright sRGB image; transparency becomes white.

    Raises:
        ValueError: The file is no picture, is cut short, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode not in EIGHT_BIT_MODES:
                raise ValueError(
                    f"{path}: pixels of kind {opened.mode}; the study shows 8-bit pictures, "
                    "convert it to 8-bit RGB"
                )
            profile = opened.info.get("icc_profile")
            upright = ImageOps.exif_transpose(opened)
            upright.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error}); make it again") from error
    return _to_srgb(_flatten(upright), profile)


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture if picture.mode == "CMYK" else picture.convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the picture in sRGB: without it a wide-gamut side looks paler in some browsers."""
    if not profile:
        return picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(
            f"its colour profile cannot be applied ({error}); save it as sRGB"
        ) from error
    return converted if converted is not None else picture.convert("RGB")


def read_pair(a: Path, b: Path) -> tuple[Image.Image, Image.Image]:
    """Return both pictures at the larger one's size; the smaller is enlarged bicubically.

    Raises:
        ValueError: The aspect ratios differ by more than rounding.
    """
    picture_a, picture_b = read_rgb(a), read_rgb(b)
    (width_a, height_a), (width_b, height_b) = picture_a.size, picture_b.size
    # One pixel of rounding in the smaller picture's side is allowed.
    if abs(width_a * height_b - width_b * height_a) > max(*picture_a.size, *picture_b.size):
        raise ValueError(
            f"{a} is {width_a}×{height_a} and {b} is {width_b}×{height_b}: other aspect ratios; "
            "crop both alike, the study shows them at one size"
        )
    shown = max(picture_a.size, picture_b.size)
    return _enlarged(picture_a, shown), _enlarged(picture_b, shown)


def _enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def blur_heavily(picture: Image.Image) -> Image.Image:
    """Return the picture blurred so strongly that no attentive rater prefers it."""
    return picture.filter(ImageFilter.GaussianBlur(max(2.0, max(picture.size) / 50)))


def write_shown(picture: Image.Image, stem: Path, picture_format: PictureFormat) -> str:
    """Write what the raters see, without metadata, and return the file's name."""
    if picture_format == "png":
        path = stem.with_name(stem.name + ".png")
        picture.save(path, compress_level=4)
    else:
        path = stem.with_name(stem.name + ".jpg")
        # On Set5 and Set14: 46 dB in the median, 43 at worst (95: 42 and 36), half a PNG's size.
        picture.save(path, quality=98, subsampling=0)
    return path.name


def thumbnail_jpeg(path: Path, side_px: int) -> bytes:
    """Return a small JPEG file of the picture."""
    picture = read_rgb(path)
    picture.thumbnail((side_px, side_px), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
