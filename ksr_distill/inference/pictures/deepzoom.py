"""DeepZoom: a folder of small pictures at every size, and a page that needs no server."""

import html
import json
from importlib import resources
from pathlib import Path

import pyvips

TILE_PX = 254
OVERLAP_PX = 1


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that is no DeepZoom of ours."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "picture.dzi").exists():
        raise OSError(f"{folder} is a folder with other things in it; use another -o")


def write_deepzoom(image: pyvips.Image, folder: Path, *, title: str) -> None:
    """Write picture.dzi, picture_files/ and index.html, which opens from file:// by itself."""
    folder.mkdir()
    suffix = ".png" if image.hasalpha() else ".jpg"
    quality = "" if image.hasalpha() else "[Q=90]"
    image.dzsave(
        str(folder / "picture"),
        suffix=suffix + quality,
        tile_size=TILE_PX,
        overlap=OVERLAP_PX,
        depth="onepixel",
    )
    picture = {
        "width": image.width,
        "height": image.height,
        "tile": TILE_PX,
        "overlap": OVERLAP_PX,
        "folder": "picture_files",
        "suffix": suffix,
    }
    template = resources.files("ksr_distill.inference.pictures") / "templates" / "deepzoom.html"
    page = template.read_text(encoding="utf-8")
    page = page.replace("{{ title }}", html.escape(title))
    page = page.replace("{{ picture }}", json.dumps(picture))
    (folder / "index.html").write_text(page, encoding="utf-8")
