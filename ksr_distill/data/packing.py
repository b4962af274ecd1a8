"""Packs a folder of photos into indexed shards; resumable, with byte-identical results.

Which files a shard holds is decided before any is read: files are ordered by a hash of their path,
split into train and validation by it, and cut into equal groups. So each shard depends only on its
own files. A shard whose index exists is finished; a restarted run makes the others. A tar is
written to ``.tmp``, synced and renamed, then its index is written.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ksr_distill.data.index import Member, index_path, read_index, write_index
from ksr_distill.data.processes import ordered_map
from ksr_distill.data.secure_webdataset import webdataset
from ksr_distill.data.sources import (
    PackedPhoto,
    PackOptions,
    SourceFile,
    find_photos,
    is_validation,
    pack_photo,
)
from ksr_distill.durable import flush_to_disk, replace_file

SPLITS = ("train", "val")
MANIFEST = "pack.json"
FEW_FILES = 64  # packed faster than worker processes start


class PackReport(NamedTuple):
    """What a pack made.

    Attributes:
        patterns: By split, what to give as ``data.shards`` and ``data.val_shards``; only for splits
            that have files.
        num_pictures: By split.
        skipped: Files that were left out, wholly or in part, and why.
    """

    patterns: dict[str, str]
    num_pictures: dict[str, int]
    skipped: list[tuple[str, str]]


class _Shard(NamedTuple):
    path: Path
    number: int
    files: tuple[SourceFile, ...]


def pack_folder(
    folder: Path,
    out: Path,
    options: PackOptions,
    *,
    num_workers: int,
    on_progress: Callable[[int, int], None],
) -> PackReport:
    """Pack the photos below a folder into shards, skipping those that are finished.

    Args:
        num_workers: Processes that decode and encode; none are started for a few files.
        on_progress: Told the files done and the files in all.

    Raises:
        ValueError: If the folder holds no picture that can be used, or ``out`` was begun with other
            photos or options.
    """
    _check_options(options)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the photos")
    files = find_photos(folder)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, files, options)
    shards = _plan_shards(out, files, options)
    num_done = 0
    is_small = len(files) < FEW_FILES
    pack_one = partial(pack_photo, folder, options)
    with ordered_map(0 if is_small else num_workers) as run:
        for split in SPLITS:
            for shard in shards[split]:
                on_progress(num_done, len(files))
                if not index_path(shard.path).exists():
                    count = _counter(on_progress, num_done, len(files))
                    _write_shard(shard, count(run(pack_one, [file.path for file in shard.files])))
                num_done += len(shard.files)
    on_progress(num_done, len(files))
    return _report(shards)


def pattern_of(out: Path, split: str, num_shards: int) -> str:
    """Return the brace pattern of a split's shards."""
    if num_shards == 1:
        return str(out / f"{split}-000000.tar")
    return str(out / f"{split}-{{000000..{num_shards - 1:06d}}}.tar")


def _check_options(options: PackOptions) -> None:
    if not 0 <= options.val_fraction < 1:
        raise ValueError(f"--val-fraction={options.val_fraction} is not in [0, 1); use e.g. 0.05")
    if options.tile_px is not None and options.tile_px < 1:
        raise ValueError(f"--tile-px={options.tile_px} is not positive; use e.g. 512")
    outside = [share for share in options.reduced_to if not 0 < share < 1]
    if outside:
        raise ValueError(f"--reduced-to={outside[0]:g} is not between 0 and 1; use e.g. 0.75")
    if options.shard_files < 1:
        raise ValueError(f"--shard-files={options.shard_files} is not positive; use e.g. 512")


def _claim(out: Path, files: Sequence[SourceFile], options: PackOptions) -> None:
    listing = json.dumps([[file.path, file.size] for file in files])
    manifest = {
        "options": json.loads(json.dumps(asdict(options))),  # tuples become lists
        "num_files": len(files),
        "files_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    path = out / MANIFEST
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != manifest:
        raise ValueError(
            f"{out} holds shards of other photos or other options (see {path}); "
            "give another output folder, or delete this one"
        )
    replace_file(path, (json.dumps(manifest, indent=1) + "\n").encode())


def _plan_shards(
    out: Path, files: Sequence[SourceFile], options: PackOptions
) -> dict[str, list[_Shard]]:
    by_split: dict[str, list[SourceFile]] = {split: [] for split in SPLITS}
    for file in files:
        by_split["val" if is_validation(file, options) else "train"].append(file)
    size = options.shard_files
    return {
        split: [
            _Shard(out / f"{split}-{n:06d}.tar", n, tuple(chosen[n * size : (n + 1) * size]))
            for n in range(-(-len(chosen) // size))
        ]
        for split, chosen in by_split.items()
    }


def _write_shard(shard: _Shard, photos: Iterable[PackedPhoto]) -> None:
    temporary = shard.path.with_name(shard.path.name + ".tmp")
    pattern = str(shard.path).replace(f"{shard.number:06d}.tar", "%06d.tar.tmp")
    details: list[tuple[int, int, int]] = []
    skipped: list[tuple[str, str]] = []
    with temporary.open("wb") as file:
        # One shard a writer, so that what is in it never depends on how large the pictures became.
        writer = webdataset.ShardWriter(
            pattern,
            start_shard=shard.number,
            maxcount=2**62,
            maxsize=2**62,
            verbose=0,
            opener=lambda _: file,
            encoder=False,
            mtime=0,
        )
        for photo in photos:
            skipped.extend(photo.skipped)
            for picture in photo.pictures:
                writer.write({"__key__": picture.key, picture.suffix: picture.content})
                details.append((picture.crc32, picture.width, picture.height))
        writer.close()
    flush_to_disk(temporary)
    with tarfile.open(temporary, "r:") as tar:
        members = [
            Member(entry.name, entry.offset_data, entry.size, *detail)
            for entry, detail in zip(tar, details, strict=True)
        ]
    temporary.replace(shard.path)
    flush_to_disk(shard.path.parent)
    write_index(shard.path, members, skipped)


def _report(shards: dict[str, list[_Shard]]) -> PackReport:
    patterns, num_pictures = {}, {}
    skipped: list[tuple[str, str]] = []
    for split, parts in shards.items():
        indexes = [read_index(shard.path) for shard in parts]
        num_pictures[split] = sum(index.header.num_members for index in indexes)
        skipped.extend(pair for index in indexes for pair in index.skipped)
        if parts:
            patterns[split] = pattern_of(parts[0].path.parent, split, len(parts))
    if not sum(num_pictures.values()):
        raise ValueError(
            f"none of the {len(skipped)} pictures could be used, the first: {skipped[0][0]}: "
            f"{skipped[0][1]}; look at the photos and at --min-side-px, --min-sharpness, --tile-px"
        )
    return PackReport(patterns, num_pictures, sorted(skipped))


def _counter(
    on_progress: Callable[[int, int], None], num_before: int, num_files: int
) -> Callable[[Iterable[PackedPhoto]], Iterator[PackedPhoto]]:
    def count(photos: Iterable[PackedPhoto]) -> Iterator[PackedPhoto]:
        for number, photo in enumerate(photos, num_before + 1):
            yield photo
            on_progress(number, num_files)

    return count
