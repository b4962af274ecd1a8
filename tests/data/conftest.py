"""Photos made of noise, small and of every kind, and shards of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ksr_distill.data.packing import PackReport, pack_folder
from ksr_distill.data.sources import PackOptions

NUM_PHOTOS = 22


def options(**changes) -> PackOptions:
    defaults = {
        "val_fraction": 0.2,
        "val_patterns": (),
        "min_side_px": 1,
        "min_sharpness": 0.0,
        "tile_px": None,
        "shard_files": 4,
    }
    return PackOptions(**{**defaults, **changes})


def pack(folder: Path, out: Path, *, num_workers: int = 0, **changes) -> PackReport:
    return pack_folder(
        folder, out, options(**changes), num_workers=num_workers, on_progress=lambda *_: None
    )


def noise(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    suffixes = ("jpg", "png", "webp", "tif", "bmp")
    for number in range(NUM_PHOTOS):
        place = folder / f"album {number % 3}"
        place.mkdir(exist_ok=True)
        suffix = suffixes[number % len(suffixes)]
        noise(number, 44 + number, 40).save(place / f"IMG.{number}.{suffix}")
    return folder


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory) -> Path:
    """A folder of shards: all photos in train, 4 a shard."""
    out = tmp_path_factory.mktemp("shards")
    pack(photos, out, val_fraction=0.0)
    return out
