"""The photos of a benchmark: pairs on disk, or originals that are degraded when they are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from ksr_distill.degradation import Degradation
from ksr_distill.levels import from_levels, to_levels

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
HIRES_ENDING, LOWRES_ENDING = "_HR", "_LR"


@dataclass(frozen=True)
class BenchmarkImage:
    """Where an image's files are.

    Attributes:
        hires: The original; None where only the lowres is known.
        lowres: None where it is made from the original.
    """

    name: str
    hires: Path | None
    lowres: Path | None


@dataclass(frozen=True)
class Pair:
    """An image of the benchmark, loaded, in [-1, 1]."""

    lowres: Float[Tensor, "1 3 h w"]
    hires: Float[Tensor, "1 3 H W"] | None


def find_images(originals: Path | None, lowres: Path | None = None) -> list[BenchmarkImage]:
    """Return the images of a folder of pairs, of a folder of photos, or of two folders.

    Args:
        originals: With `NAME_HR.*` and `NAME_LR.*` side by side, or photos alone.
        lowres: The second folder. `NAME.*`, or with the scale after it as in DIV2K: `NAMEx2.*`.

    Raises:
        ValueError: If a folder is missing or empty, or a file has no partner.
    """
    if lowres is not None:
        return _from_two_folders(originals, lowres)
    if originals is None:
        raise ValueError("benchmark is not set; give a folder of photos or of *_HR/*_LR pairs")
    files = _files_by_stem(originals, "benchmark")
    paired = [stem for stem in files if stem.endswith((HIRES_ENDING, LOWRES_ENDING))]
    if not paired:
        return [BenchmarkImage(stem, path, None) for stem, path in files.items()]
    names = sorted({stem[: -len(HIRES_ENDING)] for stem in paired})
    for name in names:
        for ending in (HIRES_ENDING, LOWRES_ENDING):
            if name + ending not in files:
                raise ValueError(
                    f"benchmark={originals} has no {name}{ending}.* beside its partner; "
                    "add it, or remove the partner"
                )
    return [
        BenchmarkImage(name, files[name + HIRES_ENDING], files[name + LOWRES_ENDING])
        for name in names
    ]


def common_scale(images: Sequence[BenchmarkImage]) -> int | None:
    """Return hires side / lowres side of all pairs, from the files' headers; None without pairs.

    Raises:
        ValueError: If a file is no picture, or the sizes of a pair do not fit.
    """
    scale = None
    for image in images:
        if image.hires is None or image.lowres is None:
            continue
        hires_size, lowres_size = _size(image.hires), _size(image.lowres)
        scale = scale or max(1, round(hires_size[0] / lowres_size[0]))
        if hires_size != (lowres_size[0] * scale, lowres_size[1] * scale):
            raise ValueError(
                f"{image.name}: the original is {_wxh(hires_size)} px and the lowres "
                f"{_wxh(lowres_size)} px; ×{scale} needs {_wxh([s * scale for s in lowres_size])}"
            )
    return scale


def load_pair(
    image: BenchmarkImage,
    *,
    scale: int,
    degradation: Degradation | None,
    generator: torch.Generator,
) -> Pair:
    """Return the image's tensors on the CPU; a photo's sides are cut to multiples of the scale.

    Args:
        degradation: Makes the lowres where the image has none on disk.
        generator: Of the degradation's draws.

    Raises:
        ValueError: If a file is no picture, or there is neither a lowres nor a degradation.
    """
    hires = None if image.hires is None else read_image(image.hires)
    if image.lowres is not None:
        return Pair(read_image(image.lowres), hires)
    if hires is None or degradation is None:
        raise ValueError(
            f"{image.name} has no lowres; name a recipe, e.g. degradation=bicubic, or give lowres="
        )
    height, width = (side // scale * scale for side in hires.shape[-2:])
    hires = hires[..., :height, :width].contiguous()
    return Pair(degradation(hires, generator=generator), hires)


def read_image(path: Path) -> Float[Tensor, "1 3 H W"]:
    """Return a picture file as RGB in [-1, 1]."""
    try:
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return from_levels(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])


def write_image(image: Float[Tensor, "1 3 H W"], path: Path) -> None:
    """Write [-1, 1] as an 8-bit file in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    as_picture(image).save(path)


def as_picture(image: Float[Tensor, "1 3 H W"]) -> PIL.Image.Image:
    """Return [-1, 1] as an 8-bit PIL image."""
    pixels = to_levels(image[0]).byte()
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _from_two_folders(originals: Path | None, lowres: Path) -> list[BenchmarkImage]:
    smaller = _files_by_stem(lowres, "lowres")
    if originals is None:
        return [BenchmarkImage(stem, None, path) for stem, path in smaller.items()]
    larger = _files_by_stem(originals, "benchmark")
    partners = {}
    for stem, path in smaller.items():
        name = stem if stem in larger else stem.rpartition("x")[0]
        if name not in larger:
            raise ValueError(f"{path} has no original of its name in benchmark={originals}")
        partners[name] = path
    alone = sorted(larger.keys() - partners.keys())
    if alone:
        raise ValueError(f"{larger[alone[0]]} has no lowres of its name in lowres={lowres}")
    return [BenchmarkImage(name, larger[name], partners[name]) for name in sorted(partners)]


def _files_by_stem(folder: Path, key: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{key}={folder} is no folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{key}={folder} has no pictures; allowed are {', '.join(SUFFIXES)}")
    files: dict[str, Path] = {}
    for path in paths:
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path} have one name; rename one of them")
        files[path.stem] = path
    return files


def _size(path: Path) -> tuple[int, int]:
    try:
        with PIL.Image.open(path) as picture:
            return picture.size
    except (OSError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _wxh(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
