"""Crops from tars without an index, local or remote, through webdataset's own reader.

webdataset cannot resume, and drops or doubles data unless shards are drawn anew all the time
(measured; docs/reliability.md). So every worker of every rank draws shards with replacement, from
its own seed; a training that is resumed draws others than an uninterrupted one would have. Who
needs an exact resume packs the photos with ``ksr shards pack``.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from braceexpand import braceexpand
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ksr_distill.data.patterns import REMEDY, expand_shards, refuse_pipe
from ksr_distill.data.pictures import PICTURE_ERRORS, decode_stored
from ksr_distill.data.reader import MAX_SUBSTITUTES, HiresSample, random_crop
from ksr_distill.data.secure_webdataset import webdataset

REMOTE_SCHEMES = ("http", "https", "gs", "hf", "ais", "sftp", "ftps", "scp")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PICKLE_SUFFIXES = (".pyd", ".pkl", ".pickle", ".pth", ".pt")


class StreamDataset(IterableDataset[HiresSample]):
    """An endless stream of crops, drawn with replacement.

    Args:
        urls: Of the tars, see `expand_stream`.
        entropy: Integers that differ between ranks, and between a training and its resumption.
        flip_prob: Share of crops that are mirrored left to right.
        transpose_prob: Share of crops whose rows become columns, before that.
        shuffle_buffer: Encoded pictures that a worker holds to draw from.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        entropy: Sequence[int],
        crop_px: int,
        flip_prob: float | int,
        transpose_prob: float | int,
        shuffle_buffer: int,
    ) -> None:
        super().__init__()
        self.urls = list(urls)
        self.entropy = tuple(entropy)
        self.crop_px = crop_px
        self.flip_prob = flip_prob
        self.transpose_prob = transpose_prob
        self.shuffle_buffer = shuffle_buffer

    def __iter__(self) -> Iterator[HiresSample]:
        worker = get_worker_info()
        entropy = [*self.entropy, worker.id + 1 if worker else 0]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
        trouble = _Trouble()
        urls = webdataset.ResampledShards(
            self.urls, deterministic=True, seed=seed, worker_seed=lambda: seed
        )
        files = webdataset.tariterators.tar_file_expander(
            _open_shards(urls, trouble), handler=trouble.handle, eof_value=None
        )
        mix = webdataset.shuffle(
            self.shuffle_buffer, initial=self.shuffle_buffer, rng=random.Random(seed)
        )
        for number, member in enumerate(mix(_pictures_alone(files, trouble))):
            where = f"{member['__url__']}: {member['fname']}"
            try:
                window = self._crop(member["data"], number, seed)
            except PICTURE_ERRORS as error:
                trouble.add(f"{where}: {error}")
                continue
            yield HiresSample(window, -1, trouble.clear())

    def _crop(self, content: bytes, number: int, seed: int) -> UInt8[Tensor, "3 H W"]:
        image = decode_stored(content)
        if min(image.size) < self.crop_px:
            raise ValueError(f"{image.width}×{image.height} is smaller than {self.crop_px} px")
        return random_crop(
            image,
            number,
            seed=seed,
            crop_px=self.crop_px,
            flip_prob=self.flip_prob,
            transpose_prob=self.transpose_prob,
        )


class _Trouble:
    """What went wrong since the last good sample; ends the stream when it never stops."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.num_pictures = 0

    def add(self, reason: str) -> None:
        self.reasons.append(reason)
        if len(self.reasons) > MAX_SUBSTITUTES:
            raise ValueError(
                f"data.shards: {len(self.reasons)} failures in a row and no usable picture between "
                f"them; the last: {reason}; look at the shards, or give others"
            )

    def handle(self, error: Exception) -> bool:
        """Say to webdataset's reader: go on with the next shard."""
        reason, where = str(error.args[0]), str(error.args[-1])  # it appends the URL
        self.add(reason if where in reason else f"{where}: {reason}")
        return True

    def clear(self) -> tuple[str, ...]:
        reasons = tuple(self.reasons)
        self.reasons.clear()
        return reasons


class PlainTar:
    """A byte stream that must be an uncompressed tar: a small gz can unpack to any size."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self.stream = stream
        self.url = url
        self.is_checked = False
        self.num_reads_beyond = 0

    def __str__(self) -> str:
        """The URL: webdataset puts it into its errors."""
        return self.url

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            ValueError: At the first read, if this is no tar; at its end, if a member goes on:
                tarfile would read nothing as often as a made-up size says.
        """
        content = self.stream.read(size)
        self.num_reads_beyond += not content
        if self.num_reads_beyond > 8:
            raise ValueError("it ends inside a member")
        if not self.is_checked and content[257:262] != b"ustar":
            raise ValueError("not an uncompressed tar")
        self.is_checked = True
        return content


def expand_stream(pattern: str | Sequence[str], *, key: str) -> tuple[str, ...]:
    """Return the URLs and paths that a pattern names.

    Args:
        pattern: URLs or paths, with braces, or a list of such; paths may have glob signs.
        key: The setting it came from, for the message.

    Raises:
        ValueError: For ``pipe:``, an unknown scheme, or a path that matches nothing.
    """
    urls: list[str] = []
    for part in [pattern] if isinstance(pattern, str) else list(pattern):
        refuse_pipe(part, key=key)
        scheme = urlparse(part).scheme
        if scheme in REMOTE_SCHEMES:
            urls.extend(braceexpand(part))
        elif scheme in ("", "file"):
            path = url2pathname(urlparse(part).path) if scheme else part
            urls.extend(str(shard) for shard in expand_shards(path, key=key))
        else:
            allowed = ", ".join(REMOTE_SCHEMES)
            raise ValueError(f"{key}={part!r}: unknown scheme {scheme}:, use a path or {allowed}")
    if not urls:
        raise ValueError(f"{key}={pattern!r} names no shards; {REMEDY}")
    return tuple(urls)


def _open_shards(urls: Iterable[dict], trouble: _Trouble) -> Iterator[dict[str, object]]:
    for source in urls:
        url, num_before = source["url"], trouble.num_pictures
        is_remote = urlparse(url).scheme in REMOTE_SCHEMES
        try:
            stream = webdataset.gopen(url) if is_remote else Path(url).open("rb")  # noqa: SIM115
        except OSError as error:
            trouble.add(f"{url}: {error}")
            continue
        yield {"url": url, "stream": PlainTar(stream, url)}
        stream.close()
        if trouble.num_pictures == num_before:
            trouble.add(f"{url}: no picture could be read from it")


def _pictures_alone(files: Iterable[dict], trouble: _Trouble) -> Iterator[dict]:
    for member in files:
        suffix = PurePosixPath(member["fname"]).suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            trouble.add(f"{member['__url__']}: {member['fname']}: pickled members are refused")
        elif suffix in PICTURE_SUFFIXES:
            trouble.num_pictures += 1
            yield member
