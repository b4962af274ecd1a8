"""Checks that shards are undamaged, and that crops fit into their pictures."""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ksr_distill.data.index import ShardHeader, ShardIndex, load_member, read_index
from ksr_distill.data.pictures import PICTURE_ERRORS
from ksr_distill.data.processes import ordered_map


class ShardReport(NamedTuple):
    """What was found in a shard.

    Attributes:
        problems: Pairs of a member's key, or a file's name, and what is wrong with it.
        contents: For each member its key, checksum and size.
    """

    shard: Path
    num_bytes: int
    problems: tuple[tuple[str, str], ...]
    contents: tuple[tuple[str, int, int], ...]


class CheckReport(NamedTuple):
    """What was found in all shards.

    Attributes:
        duplicates: Pairs of members ("shard: key") with the same content. They are no damage, but
            one of them in the validation shards makes its metrics too good.
    """

    shards: tuple[ShardReport, ...]
    duplicates: tuple[tuple[str, str], ...]


def check_shards(
    shards: Sequence[Path], *, num_workers: int, on_progress: Callable[[int, int], None]
) -> CheckReport:
    """Read all shards completely and report every problem.

    Args:
        num_workers: Processes; 0 does it in this one.
        on_progress: Told the shards done and the shards in all.
    """
    reports: list[ShardReport] = []
    with ordered_map(min(num_workers, len(shards) - 1)) as run:
        for report in run(check_shard, shards):
            reports.append(report)
            on_progress(len(reports), len(shards))
    return CheckReport(tuple(reports), tuple(_find_duplicates(reports)))


def check_shard(shard: Path) -> ShardReport:
    """Compare a shard with its index: the tar's table, every checksum, every picture's size."""
    try:
        index = read_index(shard)
        num_bytes = shard.stat().st_size
    except (OSError, ValueError) as error:
        return ShardReport(shard, 0, ((shard.name, str(error)),), ())
    problems = _compare_tables(shard, index, num_bytes)
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for member in index.members:
            try:
                load_member(descriptor, member)
            except PICTURE_ERRORS as error:
                problems.append((member.key, str(error)))
    finally:
        os.close(descriptor)
    contents = tuple((member.key, member.crc32, member.size) for member in index.members)
    return ShardReport(shard, num_bytes, tuple(problems), contents)


def check_sides(
    shards: Sequence[Path], headers: Sequence[ShardHeader], crop_px: int, *, key: str
) -> None:
    """Check that every packed picture has a crop, and that there is a picture at all.

    Raises:
        ValueError: If not; it names the smallest picture and what would help.
    """
    if not sum(header.num_members for header in headers):
        raise ValueError(
            f"{key}: the {len(shards)} shards from {shards[0]} on are empty; pack other photos"
        )
    filled = [
        (header.min_side_px, shard)
        for header, shard in zip(headers, shards, strict=True)
        if header.num_members
    ]
    side, shard = min(filled)
    if side < crop_px:
        smallest = min(read_index(shard).members, key=lambda member: member.side_px)
        largest = max(header.max_side_px for header in headers)
        raise ValueError(
            f"{key}={crop_px} is larger than the smallest picture, {smallest.key} in {shard} "
            f"({smallest.width}×{smallest.height}; shorter sides go up to {largest}); use at most "
            f"{side}, or pack with `ksr shards pack --min-side-px {crop_px}`"
        )


def _compare_tables(shard: Path, index: ShardIndex, num_bytes: int) -> list[tuple[str, str]]:
    problems = []
    if num_bytes != index.header.tar_bytes:
        problems.append((shard.name, f"{num_bytes} bytes, not {index.header.tar_bytes}"))
    try:
        with tarfile.open(shard, "r:") as tar:
            listed = [(entry.name, entry.offset_data, entry.size) for entry in tar]
    except (tarfile.TarError, OSError) as error:
        listed = []
        problems.append((shard.name, f"its tar headers are damaged: {error}"))
    indexed = [(member.name, member.offset, member.size) for member in index.members]
    if listed != indexed:
        num_equal = len(set(listed) & set(indexed))
        problems.append(
            (shard.name, f"its tar lists {num_equal} of {len(indexed)} members as the index does")
        )
    keys = Counter(member.key for member in index.members)
    problems.extend(
        (key, f"{count} members have this key") for key, count in keys.items() if count > 1
    )
    return problems


def _find_duplicates(reports: Sequence[ShardReport]) -> list[tuple[str, str]]:
    first_seen: dict[tuple[int, int], str] = {}
    duplicates = []
    for report in reports:
        for key, crc32, size in report.contents:
            name = f"{report.shard.name}: {key}"
            earlier = first_seen.setdefault((crc32, size), name)
            if earlier != name:
                duplicates.append((earlier, name))
    return duplicates
