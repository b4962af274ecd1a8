"""The pictures inside report.html: whole ones for the slider, lossless crops of the worst place."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

# Larger pictures are cut, never resampled: an upscaler is judged by its pixels.
MAX_STAGE_PX = 1024
CROP_PX = 128
# JPEG keeps full colour resolution here: a coloured checkerboard must survive.
STAGE_QUALITY, ERROR_QUALITY = 90, 70
ERROR_FULL_SCALE = 48
"""The error, in levels of 255, from which on the colour is the brightest."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """Return this part of a picture."""
        return picture.crop((self.left, self.top, self.left + self.width, self.top + self.height))


class View(NamedTuple):
    """Which parts of an image are shown."""

    stage: Box
    crop: Box


def choose_view(output: Path, original: Path | None) -> View:
    """Return the crop where the output is worst, and the part of the picture around it.

    Worst is where the mean absolute error is largest; without an original, the middle.
    """
    with PIL.Image.open(output) as picture:
        width, height = picture.size
        ours = np.asarray(picture.convert("RGB"))
    crop_width, crop_height = min(CROP_PX, width), min(CROP_PX, height)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if original is not None:
        error = torch.from_numpy(_absolute_error(ours, original).mean(axis=2))
        # Every eighth place is enough to find the worst, and 64 times cheaper.
        means = F.avg_pool2d(error[None].float(), (crop_height, crop_width), stride=8)[0]
        top, left = (8 * int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    crop = Box(left, top, crop_width, crop_height)
    stage_width, stage_height = min(MAX_STAGE_PX, width), min(MAX_STAGE_PX, height)
    stage = Box(
        min(max(0, left + crop_width // 2 - stage_width // 2), width - stage_width),
        min(max(0, top + crop_height // 2 - stage_height // 2), height - stage_height),
        stage_width,
        stage_height,
    )
    return View(stage, crop)


def stage_uri(path: Path, box: Box) -> str:
    """Return a part of a picture as a data URI."""
    with PIL.Image.open(path) as picture:
        return _uri(box.of(picture.convert("RGB")), "JPEG", quality=STAGE_QUALITY, subsampling=0)


def crop_uri(path: Path, box: Box) -> str:
    """Return a part of a picture as a lossless data URI."""
    with PIL.Image.open(path) as picture:
        return _uri(box.of(picture.convert("RGB")), "WEBP", lossless=True)


def enlarged_uri(lowres: Path, box: Box, scale: int) -> str:
    """Return the lowres pixels that belong to a part, each as a square of scale pixels."""
    with PIL.Image.open(lowres) as picture:
        size = (picture.width * scale, picture.height * scale)
        enlarged = picture.convert("RGB").resize(size, PIL.Image.Resampling.NEAREST)
    return _uri(box.of(enlarged), "WEBP", lossless=True)


def error_uri(output: Path, original: Path, box: Box) -> str:
    """Return the mean absolute error of R, G and B in colour: black none, white 48 levels."""
    with PIL.Image.open(output) as picture:
        ours = np.asarray(picture.convert("RGB"))
    error = np.clip(_absolute_error(ours, original).mean(axis=2) / ERROR_FULL_SCALE, 0, 1)
    coloured = (mpl.colormaps["inferno"](error)[..., :3] * 255).round().astype(np.uint8)
    return _uri(box.of(PIL.Image.fromarray(coloured)), "JPEG", quality=ERROR_QUALITY)


def _absolute_error(ours: UInt8[np.ndarray, "H W 3"], original: Path) -> Float[np.ndarray, "H W 3"]:
    with PIL.Image.open(original) as picture:
        theirs = np.asarray(picture.convert("RGB"))
    return np.abs(ours.astype(np.float32) - theirs.astype(np.float32))


def _uri(picture: PIL.Image.Image, kind: str, **options: int | bool) -> str:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
