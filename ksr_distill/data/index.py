"""The index beside each shard: offset, size and checksum of every member.

One JSON file a shard, ``train-000000.index.json`` beside ``train-000000.tar``. The first line alone
holds the header, so that 20 000 shards are planned without reading a single member's line:

    {"header": {"format": …, "tar": …, "num_members": …}, "header_crc32": …, "members": [
    ["key.webp", offset, bytes, crc32, width, height],
    …
    ], "skipped": [["photos/broken.jpg", "reason"], …], "crc32": …}

Image decoders do not notice flipped bits (JPEG: 185 of 200 decoded silently wrong), nor does tar;
only the checksums do. The index carries its own.
"""

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ksr_distill.data.pictures import decode_stored
from ksr_distill.durable import replace_file

FORMAT = "ksr-shard-index-1"


class Member(NamedTuple):
    """A picture in a shard.

    Attributes:
        name: Its name in the tar, key and extension.
        offset: The first byte of its content in the tar.
        size: Bytes.
        crc32: Of these bytes.
        width: Pixels.
        height: Pixels.
    """

    name: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int

    @property
    def key(self) -> str:
        """The name without its extension: what webdataset calls ``__key__``."""
        return self.name.rpartition(".")[0]

    @property
    def side_px(self) -> int:
        """The shorter side."""
        return min(self.width, self.height)


@dataclass(frozen=True)
class ShardHeader:
    """What planning needs to know of a shard. Sides are the pictures' shorter ones, in pixels."""

    format: str
    tar: str
    tar_bytes: int
    num_members: int
    min_side_px: int
    max_side_px: int


class ShardIndex(NamedTuple):
    """The whole index of a shard, with what was left out when it was packed, and why."""

    header: ShardHeader
    members: tuple[Member, ...]
    skipped: tuple[tuple[str, str], ...]


def index_path(shard: Path) -> Path:
    """Return where the index of a shard lies."""
    return shard.with_suffix(".index.json")


def write_index(shard: Path, members: Iterable[Member], skipped: Iterable[tuple[str, str]]) -> Path:
    """Write the index of a finished shard, whole or not at all.

    Args:
        shard: The tar, at its final place.
        skipped: Pairs of a source file and why it was left out.
    """
    members = tuple(members)
    sides = [member.side_px for member in members] or [0]
    header = asdict(
        ShardHeader(FORMAT, shard.name, shard.stat().st_size, len(members), min(sides), max(sides))
    )
    checksum = zlib.crc32(json.dumps(header).encode())
    lines = ",\n".join(json.dumps(list(member)) for member in members)
    left_out = json.dumps([list(pair) for pair in skipped])
    text = f'{{"header": {json.dumps(header)}, "header_crc32": {checksum}, "members": [\n{lines}\n'
    text += f'], "skipped": {left_out}'
    text += f', "crc32": {zlib.crc32(text.encode())}}}\n'
    path = index_path(shard)
    replace_file(path, text.encode())
    return path


def read_header(shard: Path) -> ShardHeader:
    """Return the header of a shard's index, from its first line.

    Raises:
        ValueError: If there is no index, or it is damaged.
    """
    path = index_path(shard)
    if path.exists() and not path.is_file():
        raise _damaged(path)
    try:
        with path.open(encoding="utf-8") as file:
            first_line = file.readline()
        return _parse_header(json.loads(first_line + "]}"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{shard} has no index {path.name} beside it; pack it with `ksr shards pack`, "
            "or read it with data=stream"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error


def read_index(shard: Path) -> ShardIndex:
    """Return the whole index of a shard, its checksum verified.

    Raises:
        ValueError: If it is damaged.
    """
    path = index_path(shard)
    try:
        text = path.read_bytes()
        content = json.loads(text)
        header = _parse_header(content)
        members = tuple(Member(*fields) for fields in content["members"])
        skipped = tuple((str(file), str(reason)) for file, reason in content["skipped"])
        body = text[: text.rindex(b', "crc32": ')]
        is_whole = zlib.crc32(body) == content["crc32"] and len(members) == header.num_members
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if not is_whole:
        raise _damaged(path)
    return ShardIndex(header, members, skipped)


def load_member(descriptor: int, member: Member) -> Image.Image:
    """Return a member's picture from the open tar, after verifying its checksum.

    Raises:
        PICTURE_ERRORS: If it is not what the index says; the message is the reason alone.
    """
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise ValueError("the shard is cut short")
    if zlib.crc32(content) != member.crc32:
        raise ValueError("its checksum is wrong, its bytes changed")
    image = decode_stored(content)
    if image.size != (member.width, member.height):
        raise ValueError(f"is {image.width}×{image.height}, not as indexed")
    return image


def _parse_header(content: dict) -> ShardHeader:
    if zlib.crc32(json.dumps(content["header"]).encode()) != content["header_crc32"]:
        raise ValueError("header checksum")
    header = ShardHeader(**content["header"])
    if header.format != FORMAT:
        raise ValueError("format")
    return header


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged or of another format (expected {FORMAT}); "
        "delete this file and its tar, and run the same `ksr shards pack` again"
    )
