"""Which pictures become which files."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ksr_distill.inference.pictures.reading import SUFFIXES
from ksr_distill.inference.pictures.writing import FORMATS, format_of, is_written


class Job(NamedTuple):
    """One picture and where it goes.

    Attributes:
        name: The format's, a key of FORMATS.
    """

    source: Path
    target: Path
    name: str


class Shard(NamedTuple):
    """Which part of the work this process does: part ``index`` of ``count``, from 0."""

    index: int = 0
    count: int = 1


def parse_shard(text: str) -> Shard:
    """Return "2/8" as the third of eight parts; parts are counted from 0."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text} is not i/n with 0 ≤ i < n; use e.g. 0/8 to 7/8")
    return Shard(int(index), int(count))


def default_out(source: Path, scale: float | int, *, name: str | None) -> Path:
    """Return photo_x2.jpg for photo.jpg, .png where its own format is not written; or photos_x2.

    Args:
        name: The format that was asked for, if any.
    """
    place = source.resolve() if source.name in ("", "..") else source
    if source.is_dir():
        return place.with_name(f"{place.name}_x{scale:g}")
    own = source.suffix if is_written(source) else ".png"
    suffix = FORMATS[name].suffixes[0] if name in FORMATS else own
    return source.with_name(f"{source.stem}_x{scale:g}{suffix}")


def plan_jobs(source: Path, out: Path, *, name: str | None) -> list[Job]:
    """Return the pictures of a file or folder and their targets; a folder's tree is kept.

    Args:
        out: A file for a file, or a folder.
        name: The format; by default the target's, else the source's own, else PNG.

    Raises:
        ValueError: If there is no picture, if one would be overwritten by its own enlargement or by
            another's, or if two enlargements could not lie side by side.
        OSError: If the source does not exist.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"--format {name} is not one of {', '.join(FORMATS)}")
    if source.is_dir():
        jobs = [_job(path, out / path.relative_to(source), name) for path in _pictures(source, out)]
        if not jobs:
            raise ValueError(f"{source} has no pictures in it ({', '.join(SUFFIXES)})")
    else:
        source.stat()
        jobs = [_single_job(source, out, name)]
    jobs = _with_distinct_targets(jobs)
    _refuse_nesting(jobs)
    _refuse_overwriting(jobs)
    return jobs


def _pictures(folder: Path, out: Path) -> list[Path]:
    """Return a folder's pictures, without hidden ones and without those of an output inside it."""
    root, made = folder.resolve(), out.resolve()
    is_inside = root in made.parents
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (is_inside and made in (root / path.relative_to(folder)).parents)
    ]


def _single_job(source: Path, out: Path, name: str | None) -> Job:
    is_file = bool(out.suffix) and not out.is_dir()
    if not is_file:
        return _job(source, out / source.name, name)
    own = format_of(out)
    if name not in (None, own):
        raise ValueError(f"-o {out} and --format {name} disagree; leave one of them out")
    return _job(source, out, own, keep_suffix=True)


def _job(source: Path, like: Path, name: str | None, *, keep_suffix: bool = False) -> Job:
    """Return a job whose target has the format's suffix; a DeepZoom is a folder without one."""
    if name is None:
        suffix = like.suffix.lower() or "none"
        name = next((n for n, f in FORMATS.items() if suffix in f.suffixes), "png")
    suffixes = FORMATS[name].suffixes
    if keep_suffix or like.suffix.lower() in suffixes:
        return Job(source, like, name)
    return Job(source, like.with_suffix(suffixes[0]), name)


def _with_distinct_targets(jobs: list[Job]) -> list[Job]:
    """Return the jobs; where a.bmp and a.ppm would both be a.png, they are a.bmp.png and a.ppm.png.

    An a.png beside them keeps its name.
    """
    counts = Counter(job.target for job in jobs)
    jobs = [
        job
        if counts[job.target] == 1 or job.target.name == job.source.name
        else job._replace(target=job.target.with_name(job.source.name + job.target.suffix))
        for job in jobs
    ]
    first: dict[Path, Path] = {}
    for job in jobs:
        if first.setdefault(job.target, job.source) != job.source:
            raise ValueError(
                f"{first[job.target]} and {job.source} would both become {job.target}; rename one"
            )
    return jobs


def _refuse_nesting(jobs: list[Job]) -> None:
    """Refuse x.png beside x/z.png as DeepZooms: x/ would be a picture and a folder of pictures."""
    sources = {job.target: job.source for job in jobs}
    for job in jobs:
        for parent in job.target.parents:
            if parent in sources:
                raise ValueError(
                    f"{sources[parent]} would become {parent}, a folder that {job.source} is to "
                    "lie in; rename one, or use another --format"
                )


def _refuse_overwriting(jobs: list[Job]) -> None:
    sources = {job.source.resolve(): job.source for job in jobs}
    for job in jobs:
        overwritten = sources.get(job.target.resolve())
        if overwritten is not None:
            own = overwritten == job.source
            by = "its enlargement" if own else f"the enlargement of {job.source}"
            raise ValueError(f"{overwritten} would be overwritten by {by}; use another -o")
