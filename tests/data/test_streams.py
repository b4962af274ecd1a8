import gzip
import io
import itertools
import logging
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ksr_distill.data.index import read_index
from ksr_distill.data.secure_webdataset import webdataset
from ksr_distill.data.streams import StreamDataset, expand_stream
from ksr_distill.training.datamodule import StreamDataModule
from tests.data.conftest import NUM_PHOTOS, noise
from tests.data.test_datamodule import NoisyHalf


def make_stream(urls, *entropy, shuffle_buffer=10, crop_px=16):
    return StreamDataset(
        [str(url) for url in urls],
        entropy=entropy or (1,),
        crop_px=crop_px,
        flip_prob=0.5,
        transpose_prob=0.0,
        shuffle_buffer=shuffle_buffer,
    )


def take(stream, count):
    return list(itertools.islice(stream, count))


def write_tar(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def picture(seed=0):
    buffer = io.BytesIO()
    noise(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_crops_come_from_every_shard_and_do_not_end(shards):
    samples = take(make_stream(shards.glob("*.tar")), 4 * NUM_PHOTOS)
    assert all(sample.hires_uint8.shape == (3, 16, 16) for sample in samples)
    assert not any(sample.replaced for sample in samples)


def test_ranks_workers_and_resumptions_draw_different_crops(shards):
    urls = sorted(shards.glob("*.tar"))

    def draw(*entropy):
        return torch.stack([sample.hires_uint8 for sample in take(make_stream(urls, *entropy), 8)])

    assert torch.equal(draw(1, 0, 0, 2), draw(1, 0, 0, 2))
    assert not torch.equal(draw(1, 0, 0, 2), draw(1, 0, 1, 2))
    assert not torch.equal(draw(1, 0, 0, 2), draw(1, 5, 0, 2))
    loader = DataLoader(make_stream(urls), batch_size=8, num_workers=2, collate_fn=list)
    first, second = take(loader, 2)
    assert not torch.equal(first[0].hires_uint8, second[0].hires_uint8)


def test_webdataset_runs_no_shell_and_unpickles_nothing():
    assert webdataset.utils.enforce_security
    with pytest.raises(ValueError, match="cannot open pipe"):
        webdataset.gopen("pipe:true")
    with pytest.raises(ValueError, match="security"):
        webdataset.autodecode.unpickle_loads(pickle.dumps(1))


@pytest.mark.parametrize("url", ["pipe:touch {}/ran", " PIPE:touch {}/ran"])
def test_pipe_urls_are_refused(url, tmp_path):
    with pytest.raises(ValueError, match="runs a shell command and is refused"):
        expand_stream(url.format(tmp_path), key="data.shards")
    assert not list(tmp_path.iterdir())


def test_urls_are_expanded_and_unknown_schemes_refused(shards):
    urls = expand_stream("https://example.org/{0..2}.tar", key="data.shards")
    assert urls == tuple(f"https://example.org/{n}.tar" for n in range(3))
    assert len(expand_stream(f"file:{shards}/*.tar", key="data.shards")) == 6
    with pytest.raises(ValueError, match="unknown scheme dict:"):
        expand_stream("dict://example.org/a.tar", key="data.shards")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['KSR_TEST_BOMB']}",)


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "pt"])
def test_pickled_members_are_refused_and_named(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("KSR_TEST_BOMB", str(tmp_path / "ran"))
    content = {f"a.{suffix}": pickle.dumps(Bomb()), "b.png": picture()}
    shard = write_tar(tmp_path / "a.tar", **content)
    sample = take(make_stream([shard], shuffle_buffer=1), 1)[0]
    assert sample.replaced == (f"{shard}: a.{suffix}: pickled members are refused",)
    assert not (tmp_path / "ran").exists()


def test_a_key_that_climbs_out_of_the_folder_writes_nothing(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    shard = write_tar(folder / "a.tar", **{"../../climbed.png": picture(), "/top.png": picture(1)})
    before = sorted(tmp_path.rglob("*"))
    assert len(take(make_stream([shard], shuffle_buffer=1), 4)) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_is_passed_over_and_named(shards, tmp_path):
    good = shutil.copy(shards / "train-000000.tar", tmp_path)
    cut = tmp_path / "cut.tar"
    middle = read_index(shards / "train-000001.tar").members[1].offset + 100
    cut.write_bytes((shards / "train-000001.tar").read_bytes()[:middle])
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((shards / "train-000002.tar").read_bytes()))
    broken = write_tar(tmp_path / "broken.tar", **{"a.png": picture()[:-100]})
    urls = [good, cut, packed, broken, tmp_path / "missing.tar"]
    samples = take(make_stream(urls, shuffle_buffer=1), 60)
    replaced = [what for sample in samples for what in sample.replaced]
    for url, reason in zip(
        urls[1:], ["unexpected end", "not an uncompressed tar", "a.png", "No such"], strict=True
    ):
        assert any(str(url) in what and reason in what for what in replaced), (url, replaced)


def test_a_stream_that_gives_nothing_stops_with_a_message(tmp_path):
    empty = write_tar(tmp_path / "a.tar", **{"a.txt": b"text"})
    with pytest.raises(ValueError, match=r"no usable picture between them; the last: .*a.tar"):
        take(make_stream([empty]), 1)
    small = write_tar(tmp_path / "b.tar", **{"a.png": picture()})
    with pytest.raises(ValueError, match="48×40 is smaller than 64 px"):
        take(make_stream([small], crop_px=64), 1)


def test_the_datamodule_reads_streams_and_says_that_a_resume_is_statistical(shards, caplog):
    datamodule = StreamDataModule(
        shards=f"{shards}/*.tar",
        val_shards=None,
        degradation=NoisyHalf(),
        seed=1,
        num_updates=3,
        crop_px=16,
        flip_prob=0.5,
        transpose_prob=0.0,
        batch_size=4,
        micro_batch_size=2,
        num_val_pictures=1,
        val_crop_px=16,
        val_batch_size=1,
        val_side_multiple=8,
        corrupt_budget=0,
        num_workers=0,
        prefetch_updates=2,
        worker_start_method=None,
        timeout_s=60,
        shuffle_buffer=10,
    )
    datamodule.setup("fit")
    with caplog.at_level(logging.WARNING):
        batches = list(datamodule.train_dataloader())
    assert [batch.update for batch in batches] == [0, 1, 2]
    assert datamodule.on_after_batch_transfer(batches[0], 0).lowres.shape == (4, 3, 8, 8)
    assert sum("only statistical" in record.message for record in caplog.records) == 1


def test_a_broken_picture_that_comes_again_counts_once(tmp_path):
    url = write_tar(
        tmp_path / "a.tar", **{"0.png": picture(), "1.png": b"", "2.jpg": b"no picture"}
    )
    told = {reason for sample in take(make_stream([url]), 12) for reason in sample.replaced}
    assert told == {
        f"{url}: 1.png: it is empty",
        f"{url}: 2.jpg: 10 bytes that are no JPEG or WEBP or PNG",
    }


def test_16_bits_are_scaled_and_what_is_transparent_lies_on_white(tmp_path):
    buffers = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((16, 16), 257 * 100, np.uint16)).save(buffers[0], "PNG")
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(buffers[1], "PNG")
    for buffer, level in zip(buffers, (100, 255), strict=True):
        url = write_tar(tmp_path / f"{level}.tar", **{"0.png": buffer.getvalue()})
        [sample] = take(make_stream([url]), 1)
        assert (sample.hires_uint8 == level).all()


@pytest.mark.timeout(20)
def test_a_member_that_claims_any_size_is_not_read_for_ever(tmp_path):
    url = write_tar(tmp_path / "a.tar", **{"0.png": picture(), "1.txt": b"text"})
    with tarfile.open(url) as tar:
        entry = tar.getmembers()[1]
    content = bytearray(url.read_bytes())
    header = memoryview(content)[entry.offset : entry.offset + 512]
    header[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    header.release()
    url.write_bytes(content)
    [_, sample] = take(make_stream([url], shuffle_buffer=1), 2)
    assert f"{url}: it ends inside a member" in sample.replaced
