import os
import shutil

import numpy as np
import pytest
import torch

from ksr_distill.data.index import load_member, read_header, read_index
from ksr_distill.data.plan import SamplePlan
from ksr_distill.data.reader import PictureDataset, ShardDataset, ShardReader, UnusableMemberError
from tests.data.conftest import NUM_PHOTOS


def make_dataset(folder, crop_px=16, seed=3, window_shards=2):
    paths = sorted(folder.glob("train-*.tar"))
    counts = [read_header(path).num_members for path in paths]
    plan = SamplePlan(counts, seed=seed, window_shards=window_shards)
    return ShardDataset(paths, plan, crop_px=crop_px, flip_prob=0.5, transpose_prob=0.5)


def flip_bit(path, byte, bit=0):
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_a_position_gives_the_same_crop_whoever_reads_it(shards):
    one, other = make_dataset(shards), make_dataset(shards)
    backwards = {position: other[position] for position in reversed(range(2 * NUM_PHOTOS))}
    for position in range(2 * NUM_PHOTOS):
        sample = one[position]
        assert sample.hires_uint8.shape == (3, 16, 16)
        assert sample.hires_uint8.dtype == torch.uint8
        assert torch.equal(sample.hires_uint8, backwards[position].hires_uint8)
    assert not torch.equal(one[0].hires_uint8, make_dataset(shards, seed=4)[0].hires_uint8)


def test_a_crop_is_a_window_of_its_picture_mirrored_and_transposed_or_not(shards):
    dataset = make_dataset(shards)
    seen = set()
    for position in range(24):
        place = dataset.plan.locate(position)
        _, image = dataset.reader.picture(place.shard, place.member)
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16), axis=(1, 2))
        crop = dataset[position].hires_uint8.numpy()[:, None, None]
        upright = {"": crop, "flipped": crop[..., ::-1], "transposed": crop.swapaxes(-1, -2),
                   "transposed, then flipped": crop[..., ::-1].swapaxes(-1, -2)}  # fmt: skip
        fits = [how for how, c in upright.items() if (windows == c).all(axis=(0, 3, 4)).any()]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 4


def test_200_of_200_bit_flips_in_members_are_noticed(shards, tmp_path):
    shard = shutil.copy(shards / "train-000000.tar", tmp_path)
    index = read_index(shards / "train-000000.tar")
    rng = np.random.default_rng(0)
    for _ in range(200):
        member = index.members[rng.integers(len(index.members))]
        byte, bit = member.offset + int(rng.integers(member.size)), int(rng.integers(8))
        flip_bit(tmp_path / "train-000000.tar", byte, bit)
        descriptor = os.open(shard, os.O_RDONLY)
        with pytest.raises(ValueError, match="its checksum is wrong"):
            load_member(descriptor, member)
        os.close(descriptor)
        flip_bit(tmp_path / "train-000000.tar", byte, bit)


def test_a_damaged_picture_is_replaced_by_the_same_one_everywhere_and_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    index = read_index(folder / "train-000001.tar")
    flip_bit(folder / "train-000001.tar", index.members[2].offset + 100)
    sound, damaged, again = (make_dataset(f) for f in (shards, folder, folder))
    num_replaced = 0
    for position in range(NUM_PHOTOS):
        sample = damaged[position]
        assert torch.equal(sample.hires_uint8, again[position].hires_uint8)
        if sample.replaced:
            num_replaced += 1
            key = index.members[2].key
            assert sample.replaced[0].startswith(f"train-000001.tar: {key}: its checksum")
        else:
            assert torch.equal(sample.hires_uint8, sound[position].hires_uint8)
    assert num_replaced == 1


def test_a_lost_or_cut_shard_is_passed_over_and_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    paths = sorted(folder.glob("train-*.tar"))
    dataset = make_dataset(folder)
    paths[0].unlink()
    os.truncate(paths[1], 600)
    replaced = [what for p in range(NUM_PHOTOS) for what in dataset[p].replaced]
    assert sum(what.startswith("train-000000.tar: ") for what in replaced) >= 4
    assert any("No such file" in what for what in replaced)
    assert any(what.startswith("train-000001.tar: ") and "cut short" in what for what in replaced)


def test_with_no_usable_picture_left_it_stops_and_names_one(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    dataset = make_dataset(folder)
    for path in folder.glob("train-*.tar"):
        os.truncate(path, 0)
    with pytest.raises(
        UnusableMemberError, match=r"train-00000\d.tar: .*unusable pictures in a row"
    ):
        dataset[0]


def test_a_picture_serves_crops_of_its_size_and_none_larger(shards):
    dataset = make_dataset(shards, crop_px=40)
    assert all(not dataset[p].replaced for p in range(NUM_PHOTOS))
    with pytest.raises(UnusableMemberError, match="is smaller than 41 px"):
        make_dataset(shards, crop_px=41)[0]


def test_few_files_are_open_at_once(shards):
    paths = sorted(shards.glob("train-*.tar"))
    reader = ShardReader(paths, max_open=2)
    for shard in (0, 1, 2, 0, 3):
        reader.picture(shard, 0)
        assert len(reader._open) <= 2
    reader.close()
    assert not reader._open


def test_validation_pictures_are_spread_evenly_and_cropped_in_the_middle(shards):
    paths = sorted(shards.glob("train-*.tar"))
    counts = [read_header(path).num_members for path in paths]
    chosen = PictureDataset(paths, counts, num_pictures=5, crop_px=16, side_multiple=8)
    assert len({slot for slot, _ in chosen.places}) == 5
    slot, member = chosen.places[3]
    _, image = chosen.reader.picture(slot, member)
    top, left = (image.height - 16) // 2, (image.width - 16) // 2
    expected = np.asarray(image.convert("RGB"))[top : top + 16, left : left + 16]
    assert np.array_equal(chosen[3].hires_uint8.permute(1, 2, 0).numpy(), expected)
    whole = PictureDataset(paths, counts, num_pictures=99, crop_px=None, side_multiple=16)
    assert len(whole) == NUM_PHOTOS
    assert all(s % 16 == 0 and s >= 32 for i in range(5) for s in whole[i].hires_uint8.shape[1:])
