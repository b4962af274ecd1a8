import numpy as np
import pytest
import pyvips
import torch

from ksr_distill.inference.images import as_rasters, visible_colour
from ksr_distill.inference.pictures import bleed

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


def test_the_name_of_a_file_is_no_picture():
    unchecked = getattr(as_rasters, "__wrapped__", as_rasters)  # outside tests nobody checks types
    with pytest.raises(ValueError, match="image is str; give a PIL image"):
        unchecked("photo.jpg")
