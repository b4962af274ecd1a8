"""``--compare``: sources beside results in one HTML file that needs nothing else."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
import pyvips

from ksr_distill.durable import replacing
from ksr_distill.inference.jobs.planning import Job
from ksr_distill.inference.pictures.reading import in_one_line, upright

PREVIEW_PX = 2048
"""Longest side of an embedded picture: about 1 MB each."""

TEMPLATES = Path(__file__).parent / "templates"


def write_comparison(jobs: Sequence[Job], path: Path) -> None:
    """Write the page; pictures are read one after the other, so that memory stays small.

    Args:
        jobs: Finished ones; a DeepZoom has a page of its own and is left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = [job for job in jobs if job.name != "dz"]
    page = environment.get_template("compare.html").stream(
        title=f"{len(shown)} picture{'s' if len(shown) != 1 else ''}, before and after",
        cards=_cards(shown, path.parent),
    )
    with replacing(path) as new:
        page.dump(str(new), encoding="utf-8")


def _cards(jobs: Sequence[Job], folder: Path) -> Iterator[dict[str, object]]:
    for job in jobs:
        (source, before), (result, after) = map(_preview, (job.source, job.target))
        name = job.target.relative_to(folder).as_posix()
        is_reduced = max(result.width, result.height) > PREVIEW_PX
        yield {
            "name": name,
            "link": quote(name),
            "width": result.width,
            "height": result.height,
            "before": before,
            "after": after,
            "source_size": f"{source.width} × {source.height}",
            "result_size": f"{result.width} × {result.height}",
            "note": f" (shown here with at most {PREVIEW_PX} px a side)" if is_reduced else "",
        }


def _preview(path: Path) -> tuple[pyvips.Image, str]:
    """Return a picture, and what the page shows of it."""
    try:
        image = upright(path)
        return image, _data_uri(image)
    except pyvips.Error as error:  # a target that was there already may be anything
        raise ValueError(f"{path} cannot be read as a picture: {in_one_line(error)}") from error


def _data_uri(image: pyvips.Image) -> str:
    """Return a picture as sRGB JPEG, or PNG where it is transparent; never enlarged."""
    preview = image.thumbnail_image(
        PREVIEW_PX, height=PREVIEW_PX, size="down", output_profile="srgb"
    )
    if preview.hasalpha():
        kind, data = "png", preview.pngsave_buffer(keep=0, bitdepth=8)
    else:
        kind, data = "jpeg", preview.jpegsave_buffer(Q=90, keep=0)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
