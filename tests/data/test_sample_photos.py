import numpy as np
import pytest
from PIL import Image

from ksr_distill.data.sample_photos import (
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    VALIDATION_PHOTOS,
    SamplePhoto,
    copy_sample_photos,
    locate,
)


@pytest.mark.parametrize(
    "photo", TRAINING_PHOTOS + VALIDATION_PHOTOS + HELD_OUT_PHOTOS, ids=lambda photo: photo.file
)
def test_every_photo_is_there_and_large_enough(photo):
    with Image.open(locate(photo)) as image:
        assert min(image.size) >= 300


def test_no_held_out_photo_is_seen_in_training(tmp_path):
    seen = copy_sample_photos(TRAINING_PHOTOS + VALIDATION_PHOTOS, tmp_path / "seen")
    held_out = copy_sample_photos(HELD_OUT_PHOTOS, tmp_path / "held_out")

    def thumbnail(file):
        reduced = Image.open(file).convert("L").resize((16, 16))
        levels = np.asarray(reduced, dtype=float).ravel()
        return (levels - levels.mean()) / levels.std()

    for one in held_out:
        for other in seen:
            assert np.mean(thumbnail(one) * thumbnail(other)) < 0.8, (one, other)


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"needs the package no_such.*\[quickstart\]"):
        locate(SamplePhoto("no_such", "a.png"))


def test_a_file_that_a_release_dropped_is_named():
    with pytest.raises(ValueError, match=r"nothing\.png is not in the installed skimage"):
        locate(SamplePhoto("skimage", "data/nothing.png"))
