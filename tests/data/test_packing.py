import hashlib
import multiprocessing
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import ExifTags, Image

from ksr_distill.data import packing
from ksr_distill.data.index import read_index
from ksr_distill.data.secure_webdataset import webdataset
from ksr_distill.data.sources import SourceFile, is_validation
from tests.data.conftest import NUM_PHOTOS, noise, options, pack


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(out, split="train"):
    """Every packed picture by key."""
    pictures = {}
    for shard in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for entry in tar:
                content = tar.extractfile(entry)
                pictures[entry.name] = np.asarray(Image.open(content).convert("RGB"))
    return pictures


def test_the_same_photos_make_the_same_bytes_with_any_number_of_processes(
    photos, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "FEW_FILES", 0)
    pack(photos, tmp_path, val_fraction=0.0, num_workers=1)
    assert digests(tmp_path) == digests(shards)


def pack_until(num_events, photos, out, num_survived):
    """Pack, and die without a word before an event: a photo done, a sync, a rename."""
    events = iter(range(num_events))

    def count(*_):
        if next(events, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "replace"):
        original = getattr(os, name)
        setattr(os, name, lambda *args, original=original: (count(), original(*args)))
    packing.pack_folder(photos, out, options(**KILLED_OPTIONS), num_workers=0, on_progress=count)
    num_survived.value += 1


KILLED_OPTIONS = {"val_fraction": 0.0, "shard_files": 12}
EVENTS_OF_A_SHARD = 3 + 1 + 12 + 6  # the manifest's, then its own: photos, syncs and renames


def test_killed_at_every_point_and_started_again_it_makes_the_same_bytes(photos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    pack(photos, whole, **KILLED_OPTIONS)
    context = multiprocessing.get_context("fork")
    num_survived = context.Value("i", 0)
    num_runs, finished = 0, {}
    while not num_survived.value:
        num_events = num_runs % (EVENTS_OF_A_SHARD + 2)
        child = context.Process(target=pack_until, args=(num_events, photos, out, num_survived))
        child.start()
        child.join()
        num_runs += 1
        still = {
            path.name: path.stat().st_mtime_ns
            for path in out.glob("*.tar")
            if path.with_suffix(".index.json").exists()
        }
        assert finished.items() <= still.items(), "a finished shard was written again"
        finished = still
    assert num_runs > EVENTS_OF_A_SHARD
    assert digests(out) == digests(whole)


def test_broken_files_are_left_out_and_named_with_a_reason(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise(0).save(folder / "good.jpg")
    content = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "link.png").symlink_to("nothing.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("not looked at")
    report = pack(folder, tmp_path / "out", val_fraction=0.0)
    assert report.num_pictures == {"train": 1, "val": 0}
    assert [file for file, _ in report.skipped] == ["cut.jpg", "empty.webp", "link.png", "text.png"]
    assert all(reason.startswith("broken: ") for _, reason in report.skipped)
    again = pack(folder, tmp_path / "out", val_fraction=0.0)
    assert again == report


def test_jpegs_keep_their_bytes_and_other_pictures_their_pixels(photos, shards):
    packed = stored(shards)
    assert len(packed) == NUM_PHOTOS
    originals = {path.stem.replace(".", "_"): path for path in photos.rglob("IMG*")}
    for name, pixels in packed.items():
        readable = name.partition("-")[0].partition("IMG")[2]
        path = originals["IMG" + readable]
        assert np.array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    jpegs = {path.read_bytes() for path in photos.rglob("*.jpg")}
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for entry in tar:
                if entry.name.endswith(".jpg"):
                    assert tar.extractfile(entry).read() in jpegs


def test_pictures_come_out_upright_opaque_and_in_8_bits(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = noise(1, 32, 24)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(folder / "turned.png", exif=exif)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    Image.fromarray(np.full((24, 32), 32896, dtype=np.uint16)).save(folder / "deep.png")
    pack(folder, tmp_path / "out", val_fraction=0.0)
    packed = {name.partition("-")[0]: pixels for name, pixels in stored(tmp_path / "out").items()}
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(packed["turned"], turned)
    assert packed["clear"].min() == 255
    assert np.unique(packed["deep"]).tolist() == [128]


def test_small_and_blurred_pictures_are_left_out_when_asked(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise(0, 64, 64).save(folder / "sharp.png")
    noise(0, 64, 31).save(folder / "small.png")
    Image.linear_gradient("L").save(folder / "smooth.png")
    report = pack(folder, tmp_path / "out", val_fraction=0.0, min_side_px=32, min_sharpness=50.0)
    assert report.num_pictures["train"] == 1
    assert dict(report.skipped)["small.png"] == "64×31 is smaller than 32 px"
    assert "sharpness 0.0 is below 50" in dict(report.skipped)["smooth.png"]


def test_tiles_are_cut_from_the_middle_and_keep_their_pixels(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = noise(0, 70, 50)
    image.save(folder / "a.png")
    noise(1, 70, 20).save(folder / "narrow.png")
    report = pack(folder, tmp_path / "out", val_fraction=0.0, tile_px=32)
    packed = stored(tmp_path / "out")
    assert report.skipped == [("narrow.png", "70×20 is smaller than a tile of 32 px")]
    assert sorted(name.partition("-y")[2] for name in packed) == ["9-x3.webp", "9-x35.webp"]
    left = next(pixels for name, pixels in packed.items() if name.endswith("-x3.webp"))
    assert np.array_equal(left, np.asarray(image)[9:41, 3:35])


def test_the_split_is_a_function_of_the_path_alone():
    chosen = options(val_fraction=0.25)
    files = [SourceFile(f"a/{n}.jpg", n) for n in range(4000)]
    in_val = {file.path for file in files if is_validation(file, chosen)}
    assert 900 < len(in_val) < 1100
    assert [n for n in range(20) if f"a/{n}.jpg" in in_val] == [
        0,
        4,
        7,
        8,
        14,
        15,
    ]  # on any machine
    more = options(val_fraction=0.5)
    assert in_val < {file.path for file in files if is_validation(file, more)}


def test_an_explicit_split_is_followed(photos, tmp_path):
    report = pack(photos, tmp_path, val_fraction=0.0, val_patterns=("album 1/*",))
    assert report.num_pictures["val"] == len(list((photos / "album 1").iterdir()))
    assert set(stored(tmp_path, "val")).isdisjoint(stored(tmp_path))


def test_every_photo_is_packed_once_and_webdataset_reads_it(photos, tmp_path):
    report = pack(photos, tmp_path)
    assert sum(report.num_pictures.values()) == NUM_PHOTOS
    keys = []
    for shard in tmp_path.glob("*.tar"):
        with shard.open("rb") as stream:
            source = [{"url": str(shard), "stream": stream}]
            files = webdataset.tariterators.tar_file_expander(source)
            keys += [s["__key__"] for s in webdataset.tariterators.group_by_keys(files)]
    indexed = [m.key for shard in tmp_path.glob("*.tar") for m in read_index(shard).members]
    assert sorted(keys) == sorted(indexed)
    assert len(set(keys)) == NUM_PHOTOS


def test_other_photos_or_options_are_refused_in_a_begun_folder(photos, tmp_path):
    pack(photos, tmp_path / "out")
    with pytest.raises(ValueError, match="other photos or other options"):
        pack(photos, tmp_path / "out", min_side_px=8)
    copy = shutil.copytree(photos, tmp_path / "copy")
    noise(99).save(copy / "new.png")
    with pytest.raises(ValueError, match="give another output folder"):
        pack(copy, tmp_path / "out")


def test_a_folder_that_gives_nothing_is_an_error_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        pack(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no pictures"):
        pack(tmp_path, tmp_path / "out")
    noise(0, 8, 8).save(tmp_path / "tiny.png")
    with pytest.raises(ValueError, match=r"none of the 1 pictures could be used.*8×8 is smaller"):
        pack(tmp_path, tmp_path / "out", min_side_px=16)


def test_training_photos_are_packed_in_smaller_sizes_too_if_asked(photos, tmp_path):
    report = pack(photos, tmp_path, reduced_to=(0.5, 0.25))
    train, val = stored(tmp_path), stored(tmp_path, "val")
    assert report.num_pictures == {"train": len(train), "val": len(val)}
    assert len(train) == 3 * (NUM_PHOTOS - len(val))
    assert 0 < len(val) < NUM_PHOTOS
    heights = sorted(picture.shape[0] for picture in train.values())
    assert set(heights) == {10, 20, 40}
    with pytest.raises(ValueError, match=r"--reduced-to=1.5 is not between 0 and 1"):
        pack(photos, tmp_path / "other", reduced_to=(1.5,))
