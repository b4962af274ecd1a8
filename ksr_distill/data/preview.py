"""A contact sheet of what training will see: pairs of lowres | hires."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ksr_distill.data.checking import check_sides
from ksr_distill.data.index import read_header
from ksr_distill.data.plan import SamplePlan
from ksr_distill.data.reader import ShardDataset
from ksr_distill.levels import from_levels, to_levels
from ksr_distill.randomness import Stream, generator_for

GAP_PX = 8
# As in conf/data, which an installed package lacks: with these, the sheet shows a training's first
# crops.
WINDOW_SHARDS = 16
FLIP_PROB, TRANSPOSE_PROB = 0.5, 0.0


def make_contact_sheet(
    shards: Sequence[Path],
    degrade: Callable[..., Float[Tensor, "b 3 h w"]],
    *,
    num_pairs: int,
    crop_px: int,
    seed: int,
    pairs_per_row: int,
) -> Image.Image:
    """Return the first crops of a training with this seed, degraded and as they are, side by side.

    The lowres image is enlarged without smoothing: its pixels are what the network gets.

    Args:
        degrade: ``(hires, *, generator) -> lowres``, as in ``ksr_distill.degradation``.

    Raises:
        ValueError: If shards are not indexed, or no picture has such a crop.
    """
    headers = [read_header(shard) for shard in shards]
    check_sides(shards, headers, crop_px, key="--crop-px")
    counts = [header.num_members for header in headers]
    plan = SamplePlan(counts, seed=seed, window_shards=WINDOW_SHARDS)
    dataset = ShardDataset(
        shards, plan, crop_px=crop_px, flip_prob=FLIP_PROB, transpose_prob=TRANSPOSE_PROB
    )
    pairs = []
    for position in range(min(num_pairs, plan.epoch_size)):
        hires_uint8 = dataset[position].hires_uint8
        generator = generator_for(seed, Stream.DEGRADATION, position)
        lowres = degrade(from_levels(hires_uint8[None]), generator=generator)
        pairs.append(_join(to_levels(lowres[0]).byte(), hires_uint8))
    return _arrange(pairs, pairs_per_row)


def _join(lowres: UInt8[Tensor, "3 h w"], hires: UInt8[Tensor, "3 H W"]) -> np.ndarray:
    height, width = hires.shape[-2:]
    enlarged = Image.fromarray(lowres.permute(1, 2, 0).numpy()).resize(
        (width, height), Image.Resampling.NEAREST
    )
    return np.concatenate([np.asarray(enlarged), hires.permute(1, 2, 0).numpy()], axis=1)


def _arrange(pairs: Sequence[np.ndarray], pairs_per_row: int) -> Image.Image:
    height, width = pairs[0].shape[:2]
    num_columns = min(pairs_per_row, len(pairs))
    num_rows = -(-len(pairs) // num_columns)
    size = (num_columns * (width + GAP_PX) + GAP_PX, num_rows * (height + GAP_PX) + GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, num_columns)
        place = (GAP_PX + column * (width + GAP_PX), GAP_PX + row * (height + GAP_PX))
        sheet.paste(Image.fromarray(pair), place)
    return sheet
