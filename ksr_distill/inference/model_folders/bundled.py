"""The small models shipped with the package, so that nothing needs to be downloaded."""

from importlib.resources import files
from pathlib import Path

ASSETS = "assets"
INDEX = "model_index.json"
STUDENTS = {2: "mini_x2", 4: "mini_x4"}
"""By scale, the student that `ksr upscale` takes where no model is named."""


def bundled_models() -> dict[str, Path]:
    """Return the folders of the package's models by name, as far as they are installed."""
    assets = Path(str(files("ksr_distill"))) / ASSETS
    return {index.parent.name: index.parent for index in sorted(assets.glob(f"*/{INDEX}"))}


def default_student(scale: float | int) -> Path:
    """Return the student for an enlargement: the ×4 one for 4 and its powers, else the ×2 one.

    Raises:
        ValueError: If the package brings no student.
    """
    installed = bundled_models()
    wanted = STUDENTS[4] if scale in (4, 16, 64) else STUDENTS[2]
    name = wanted if wanted in installed else STUDENTS[2]
    if name not in installed:
        raise ValueError(
            f"this package was installed without its model {name}; give one with --model FOLDER, "
            "made by ksr export, or install the wheel of a release"
        )
    return installed[name]


def find_model(model: str, *, argument: str = "--model") -> Path:
    """Return the folder that is meant: one on the disk, or one of the package's by name.

    Args:
        argument: What the user gave it as.

    Raises:
        ValueError: If it is neither.
    """
    path, installed = Path(model), bundled_models()
    if path.exists():
        return path
    if model in installed:
        return installed[model]
    raise ValueError(
        f"{argument} {model} is no model folder and none of those that come with this package "
        f"({', '.join(installed) or 'none is installed'}); give one made by ksr export"
    )
