"""Real photos from the scikit-image and scikit-learn wheels: no download."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class SamplePhoto(NamedTuple):
    """A file inside an installed package.

    Attributes:
        package: The package that brings it.
        file: Its path inside the package.
    """

    package: str
    file: str


# Photos of 300 px and more; drawings and the nearly black retina are left out. Grey ones teach
# texture; the two motorcycles are one scene from two places.
TRAINING_PHOTOS = (
    SamplePhoto("skimage", "data/astronaut.png"),
    SamplePhoto("skimage", "data/brick.png"),
    SamplePhoto("skimage", "data/coins.png"),
    SamplePhoto("skimage", "data/grass.png"),
    SamplePhoto("skimage", "data/gravel.png"),
    SamplePhoto("skimage", "data/hubble_deep_field.jpg"),
    SamplePhoto("skimage", "data/ihc.png"),
    SamplePhoto("skimage", "data/motorcycle_left.png"),
    SamplePhoto("skimage", "data/motorcycle_right.png"),
    SamplePhoto("sklearn", "datasets/images/china.jpg"),
)
# What training validates on, and chooses checkpoints by.
VALIDATION_PHOTOS = (
    SamplePhoto("skimage", "data/camera.png"),
    SamplePhoto("skimage", "data/rocket.jpg"),
)
# Seen by nothing but the last measurement: fur, a still life, a plant.
HELD_OUT_PHOTOS = (
    SamplePhoto("skimage", "data/chelsea.png"),
    SamplePhoto("skimage", "data/coffee.png"),
    SamplePhoto("sklearn", "datasets/images/flower.jpg"),
)


def copy_sample_photos(photos: tuple[SamplePhoto, ...], folder: Path) -> list[Path]:
    """Copy the photos into the folder and return their new paths.

    Raises:
        ValueError: If a package is missing, or no longer brings the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for photo in photos:
        source = locate(photo)
        copies.append(folder / source.name)
        shutil.copyfile(source, copies[-1])
    return copies


def locate(photo: SamplePhoto) -> Path:
    """Return where the photo lies, without importing its package.

    Raises:
        ValueError: If the package is missing, or no longer brings the file.
    """
    spec = find_spec(photo.package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"sample photo {photo.file} needs the package {photo.package}; "
            "run: pip install 'ksr-distill[quickstart]'"
        )
    path = Path(spec.origin).parent / photo.file
    if not path.is_file():
        raise ValueError(
            f"sample photo {path} is not in the installed {photo.package}; "
            "install the release that pyproject.toml's extra [quickstart] names"
        )
    return path
