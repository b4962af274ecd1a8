"""The order of samples: maps a position in the whole training to (epoch, shard, member).

Shards are permuted anew each epoch, and samples within windows of W permuted shards; both by Philox
keyed with (seed, epoch, window). Every sample occurs once an epoch. There is no state: a restarted
training, on any number of processes, asks for the same positions and gets the same samples. The
first position costs two permutations, of the shards and of one window, however many shards there
are.

The global batch of update u (from 0) is positions [u·B, (u+1)·B). It is cut into
world_size × accumulate micro-batches; the i-th of a rank is number rank·accumulate + i.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from ksr_distill.randomness import Stream


class Place(NamedTuple):
    """Where a position's sample lies."""

    epoch: int
    shard: int
    member: int


class Crop(NamedTuple):
    """A square window of a picture."""

    top: int
    left: int
    is_flipped: bool
    is_transposed: bool


class _Epoch(NamedTuple):
    number: int
    shards: Int[np.ndarray, " shards"]
    ends: Int[np.ndarray, " shards"]  # samples up to and with this shard, in the epoch's order


class _Window(NamedTuple):
    epoch: int
    number: int
    order: Int[np.ndarray, " samples"]


class SamplePlan:
    """The order of the samples of some shards.

    Args:
        num_members: Pictures in each shard.
        seed: Of the order.
        window_shards: How many shards a window mixes: more mixes better and keeps more files open.
    """

    def __init__(self, num_members: Sequence[int], *, seed: int, window_shards: int) -> None:
        self.num_members = np.asarray(num_members, dtype=np.int64)
        self.epoch_size = int(self.num_members.sum())
        self.seed = seed
        self.window_shards = window_shards
        self._epoch: _Epoch | None = None
        self._window: _Window | None = None

    def locate(self, position: int) -> Place:
        """Return where the sample of a position lies."""
        number, rest = divmod(position, self.epoch_size)
        epoch = self._order_of_epoch(number)
        window = int(np.searchsorted(epoch.ends, rest, side="right")) // self.window_shards
        first = window * self.window_shards
        start = int(epoch.ends[first - 1]) if first else 0
        within = start + int(self._order_of_window(epoch, window)[rest - start])
        slot = int(np.searchsorted(epoch.ends, within, side="right"))
        before = int(epoch.ends[slot - 1]) if slot else 0
        return Place(number, int(epoch.shards[slot]), within - before)

    def substitute(self, position: int, attempt: int) -> Place:
        """Return the place of a substitute for a position's sample that cannot be used.

        Args:
            attempt: 1, 2, … for the first, second, … substitute; all of the position's own epoch.
        """
        start = position // self.epoch_size * self.epoch_size
        draw, *_ = _hash_draws(self.seed, Stream.SHARD_ORDER, position, attempt)
        return self.locate(start + draw % self.epoch_size)

    def _order_of_epoch(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            shards = permutation(len(self.num_members), self.seed, Stream.SHARD_ORDER, number, 0)
            self._epoch = _Epoch(number, shards, np.cumsum(self.num_members[shards]))
        return self._epoch

    def _order_of_window(self, epoch: _Epoch, window: int) -> Int[np.ndarray, " samples"]:
        cached = self._window
        if cached is None or (cached.epoch, cached.number) != (epoch.number, window):
            first = window * self.window_shards
            size = int(self.num_members[epoch.shards[first : first + self.window_shards]].sum())
            order = permutation(size, self.seed, Stream.SHARD_ORDER, epoch.number, window + 1)
            self._window = cached = _Window(epoch.number, window, order)
        return cached.order


class UpdateSampler(Sampler[list[int]]):
    """The positions of one rank, a list for each update in [start_update, num_updates).

    Args:
        batch_size: Of the global batch; a multiple of world_size.
    """

    def __init__(
        self, *, batch_size: int, rank: int, world_size: int, start_update: int, num_updates: int
    ) -> None:
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_update = start_update
        self.num_updates = num_updates

    def __len__(self) -> int:
        """The updates that are left."""
        return max(self.num_updates - self.start_update, 0)

    def __iter__(self) -> Iterator[list[int]]:
        for update in range(self.start_update, self.num_updates):
            yield list(self.positions(update))

    def positions(self, update: int) -> range:
        """Return this rank's share of an update: its micro-batches lie side by side."""
        share = self.batch_size // self.world_size
        first = update * self.batch_size + self.rank * share
        return range(first, first + share)


def draw_crop(
    position: int,
    *,
    seed: int,
    width: int,
    height: int,
    crop_px: int,
    flip_prob: float | int,
    transpose_prob: float | int,
) -> Crop:
    """Return the window of a picture that a position sees: a function of (seed, position)."""
    vertical, horizontal, flip = _hash_draws(seed, Stream.CROP, position, 0)
    transposition, *_ = _hash_draws(seed, Stream.CROP, position, 1)
    return Crop(
        top=vertical % (height - crop_px + 1),
        left=horizontal % (width - crop_px + 1),
        is_flipped=flip < flip_prob * 2**64,
        is_transposed=transposition < transpose_prob * 2**64,
    )


def permutation(count: int, *entropy: int) -> Int[np.ndarray, " {count}"]:
    """Return a permutation that depends on these integers alone.

    By sorting raw Philox draws, because numpy promises that these never change between its
    versions, and does not promise it for ``Generator.permutation`` (NEP 19).
    """
    draws = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(draws, kind="stable")


def _hash_draws(*entropy: int) -> tuple[int, int, int]:
    """Return three uniform 64-bit integers; a tenth of the time that starting a Philox takes."""
    digest = hashlib.blake2b(struct.pack("<4Q", *entropy), digest_size=24).digest()
    return struct.unpack("<3Q", digest)
