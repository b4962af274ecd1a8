"""Crops of packed pictures by position: pread at the index's offset, checksum, decode, crop."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ksr_distill.data.index import Member, ShardIndex, load_member, read_index
from ksr_distill.data.pictures import PICTURE_ERRORS, as_array
from ksr_distill.data.plan import Place, SamplePlan, draw_crop

MAX_SUBSTITUTES = 32
"""After this many unusable pictures in a row the disk is probably lost."""


class UnusableMemberError(ValueError):
    """A member that cannot be used; the message names shard, key and reason."""

    def __init__(self, shard: Path, key: str, reason: object) -> None:
        super().__init__(f"{shard.name}: {key}: {reason}")


class HiresSample(NamedTuple):
    """A crop, and the unusable pictures that it replaces ("shard: key: reason").

    The position is -1 in a stream, which has none.
    """

    hires_uint8: UInt8[Tensor, "3 H W"]
    position: int
    replaced: tuple[str, ...]


class ShardReader:
    """The pictures of some shards, verified. Keeps a few indexes and open files per process.

    Args:
        max_open: Shards kept open; at least a window's, or every sample opens a file anew.
    """

    def __init__(self, shards: Sequence[Path], *, max_open: int) -> None:
        self.shards = tuple(shards)
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict:
        """Pickle without the open files, for a worker process."""
        return {**self.__dict__, "_open": OrderedDict()}

    def picture(
        self, shard: int, member: int, *, min_side_px: int = 1
    ) -> tuple[Member, Image.Image]:
        """Return a member and its picture.

        Raises:
            UnusableMemberError: If it cannot be read, is not what the index says, or is too small.
        """
        path, entry = self.shards[shard], f"member {member}"
        try:
            descriptor, index = self._open_shard(shard)
            found = index.members[member]
            entry = found.key
            if found.side_px < min_side_px:
                size = f"{found.width}×{found.height}"
                raise UnusableMemberError(path, entry, f"{size} is smaller than {min_side_px} px")
            return found, load_member(descriptor, found)
        except UnusableMemberError:
            raise
        except PICTURE_ERRORS as error:
            raise UnusableMemberError(path, entry, error) from error

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._close_oldest()

    def _open_shard(self, shard: int) -> tuple[int, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= self.max_open:
                self._close_oldest()
            index = read_index(self.shards[shard])
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY), index
        return self._open[shard]

    def _close_oldest(self) -> None:
        descriptor, _ = self._open.popitem(last=False)[1]
        os.close(descriptor)


class ShardDataset(Dataset[HiresSample]):
    """``dataset[position]``: the crop that a position of the plan sees, as uint8.

    A picture that cannot be used is replaced by another one of the same epoch, which is again a
    function of (seed, position): it does not depend on the process that reads it.

    Args:
        flip_prob: Share of crops that are mirrored left to right.
        transpose_prob: Share of crops whose rows become columns, before that.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        plan: SamplePlan,
        *,
        crop_px: int,
        flip_prob: float | int,
        transpose_prob: float | int,
    ) -> None:
        self.reader = ShardReader(shards, max_open=2 * plan.window_shards)
        self.plan = plan
        self.crop_px = crop_px
        self.flip_prob = flip_prob
        self.transpose_prob = transpose_prob

    def __getitem__(self, position: int) -> HiresSample:
        """Return the crop of a position.

        Raises:
            UnusableMemberError: If no usable picture was found in MAX_SUBSTITUTES attempts.
        """
        replaced: list[str] = []
        place = self.plan.locate(position)
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            try:
                return HiresSample(self._crop(place, position), position, tuple(replaced))
            except UnusableMemberError as error:
                replaced.append(str(error))
                place = self.plan.substitute(position, attempt)
        raise UnusableMemberError(
            self.reader.shards[place.shard],
            f"member {place.member}",
            f"the last of {MAX_SUBSTITUTES} unusable pictures in a row, the first: {replaced[0]}; "
            "run `ksr shards check`",
        )

    def _crop(self, place: Place, position: int) -> UInt8[Tensor, "3 H W"]:
        _, image = self.reader.picture(place.shard, place.member, min_side_px=self.crop_px)
        return random_crop(
            image,
            position,
            seed=self.plan.seed,
            crop_px=self.crop_px,
            flip_prob=self.flip_prob,
            transpose_prob=self.transpose_prob,
        )


class PictureDataset(Dataset[HiresSample]):
    """A fixed choice of pictures, evenly spread over the shards, cropped in the centre.

    Args:
        num_members: Pictures in each shard.
        num_pictures: How many to choose; all, if there are fewer.
        crop_px: Side of the crop, or None for whole pictures, their sides cut to multiples of
            side_multiple.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        num_members: Sequence[int],
        *,
        num_pictures: int,
        crop_px: int | None,
        side_multiple: int,
    ) -> None:
        ends = np.cumsum(num_members)
        total = int(ends[-1])
        chosen = [i * total // num_pictures for i in range(num_pictures)]
        chosen = chosen if num_pictures < total else list(range(total))
        slots = np.searchsorted(ends, chosen, side="right")
        self.places = [
            (int(slot), int(i - ends[slot] + num_members[slot]))
            for i, slot in zip(chosen, slots, strict=True)
        ]
        self.reader = ShardReader(shards, max_open=8)
        self.crop_px = crop_px
        self.side_multiple = side_multiple

    def __len__(self) -> int:
        """How many pictures were chosen."""
        return len(self.places)

    def __getitem__(self, picture: int) -> HiresSample:
        """Return a picture; if it cannot be used, the next of the choice that can."""
        replaced: list[str] = []
        for turn in range(len(self.places)):
            shard, member = self.places[(picture + turn) % len(self.places)]
            try:
                return HiresSample(self._crop(shard, member), picture, tuple(replaced))
            except UnusableMemberError as error:
                replaced.append(str(error))
        raise ValueError(f"no validation picture can be used, the first was {replaced[0]}")

    def _crop(self, shard: int, member: int) -> UInt8[Tensor, "3 H W"]:
        least = self.crop_px or self.side_multiple
        _, image = self.reader.picture(shard, member, min_side_px=least)
        height = self.crop_px or image.height // self.side_multiple * self.side_multiple
        width = self.crop_px or image.width // self.side_multiple * self.side_multiple
        top, left = (image.height - height) // 2, (image.width - width) // 2
        window = as_array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))


def random_crop(
    image: Image.Image,
    position: int,
    *,
    seed: int,
    crop_px: int,
    flip_prob: float | int,
    transpose_prob: float | int,
) -> UInt8[Tensor, "3 {crop_px} {crop_px}"]:
    """Return the square of a picture that a position sees, channels first: see ``draw_crop``."""
    top, left, is_flipped, is_transposed = draw_crop(
        position,
        seed=seed,
        width=image.width,
        height=image.height,
        crop_px=crop_px,
        flip_prob=flip_prob,
        transpose_prob=transpose_prob,
    )
    window = as_array(image.crop((left, top, left + crop_px, top + crop_px)))
    window = window.transpose(1, 0, 2) if is_transposed else window
    window = window[:, ::-1] if is_flipped else window
    return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))
