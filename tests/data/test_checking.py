import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.data import preview
from ksr_distill.data.checking import check_shards
from ksr_distill.data.index import index_path, read_index
from tests.data.conftest import NUM_PHOTOS, noise, pack
from tests.data.test_reader import flip_bit


def check(folder):
    shards = sorted(folder.glob("train-*.tar"))
    return check_shards(shards, num_workers=0, on_progress=lambda *_: None)


def ksr(*args):
    return CliRunner().invoke(app, ["shards", *map(str, args)])


@pytest.fixture
def damaged(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "damaged")


def test_sound_shards_have_no_problem(shards):
    report = check(shards)
    assert not any(shard.problems for shard in report.shards)
    assert report.duplicates == ()
    assert sum(len(shard.contents) for shard in report.shards) == NUM_PHOTOS


def test_every_kind_of_damage_is_found_and_named(damaged):
    shards = sorted(damaged.glob("train-*.tar"))
    index = read_index(shards[0])
    flip_bit(shards[0], index.members[1].offset + 30)
    os.truncate(shards[1], 2000)
    index_path(shards[2]).unlink()
    flip_bit(index_path(shards[3]), 40)
    with shards[4].open("r+b") as file:  # a header block of zeros ends a tar for its readers
        file.seek(read_index(shards[4]).members[1].offset - 512)
        file.write(bytes(512))
    found = [" ".join(map(" ".join, report.problems)) for report in check(damaged).shards]
    assert f"{index.members[1].key} its checksum is wrong" in found[0]
    assert "2000 bytes, not" in found[1]
    assert "cut short" in found[1]
    assert "has no index" in found[2] or "No such file" in found[2]
    assert "is damaged" in found[3]
    assert "its tar lists 1 of 4 members" in found[4]
    assert found[5] == ""


def test_pictures_packed_twice_are_shown(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b", "c"):
        noise(7).save(photos / f"{name}.png")
    pack(photos, tmp_path / "out", val_fraction=0.0, shard_files=2)
    assert len(check(tmp_path / "out").duplicates) == 2


def test_the_command_ends_with_1_when_something_is_damaged(shards, damaged):
    sound = ksr("check", f"{shards}/train-*.tar", "--workers", 0)
    assert sound.exit_code == 0
    assert "6 shards, 22 pictures" in sound.output
    flip_bit(damaged / "train-000000.tar", 600)
    broken = ksr("check", f"{damaged}/train-*.tar", "--workers", 0)
    assert broken.exit_code == 1
    assert "1 problems" in broken.output


def test_pack_says_what_to_give_to_training_and_ends_with_the_folder(photos, tmp_path):
    result = ksr("pack", photos, tmp_path / "out", "--shard-files", 8, "--val-match", "album 1/*")
    assert result.exit_code == 0
    out = tmp_path / "out"
    assert f"""data.shards='"{out}/train-{{000000..000001}}.tar"'""" in result.stdout
    assert f"data.val_shards={out}/val-000000.tar" in result.stdout
    assert result.stdout.splitlines()[-1] == str(out)


def test_pack_says_when_it_held_nothing_out(photos, tmp_path):
    few = ksr("pack", photos, tmp_path / "few", "--val-fraction", 1e-6)
    assert "none held out: --val-fraction 1e-06 chose no picture of so few" in few.stdout
    none = ksr("pack", photos, tmp_path / "none", "--val-fraction", 0)
    assert "held out" not in none.stdout


def test_a_mistake_is_one_line_and_ends_with_1(tmp_path):
    result = ksr("pack", tmp_path / "missing", tmp_path / "out")
    assert result.exit_code == 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    both = ksr("pack", tmp_path, tmp_path, "--val-match", "a", "--val-fraction", 0.1)
    assert "give one" in both.output


def test_the_preview_shows_pairs_of_lowres_and_hires(shards, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    result = ksr("preview", f"{shards}/*.tar", "-o", sheet, "--crop-px", 32, "--pairs", 5)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(sheet)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * 40 + 8, 2 * 72 + 8, 3)
    lowres, hires = pixels[8:40, 8:40], pixels[8:40, 40:72]
    assert np.array_equal(lowres[::2, ::2], lowres[1::2, 1::2])
    assert not np.array_equal(hires[::2, ::2], hires[1::2, 1::2])


def test_the_preview_draws_crops_as_conf_does():
    def conf(name):
        return yaml.safe_load(Path(f"conf/data/{name}.yaml").read_text())

    assert conf("shards")["window_shards"] == preview.WINDOW_SHARDS
    assert conf("_common")["flip_prob"] == preview.FLIP_PROB
    assert conf("_common")["transpose_prob"] == preview.TRANSPOSE_PROB


def test_the_preview_takes_a_degradation_of_conf(shards, tmp_path):
    conf = "conf/degradation/second_order.yaml"
    sheets = []
    for seed in (0, 0, 1):
        args = ("--crop-px", 32, "--pairs", 2, "--seed", seed, "--degradation", conf)
        ksr("preview", f"{shards}/*.tar", "-o", tmp_path / "sheet.png", *args)
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    foreign = tmp_path / "evil.yaml"
    foreign.write_text("_target_: os.system\ncommand: 'true'\n")
    refused = ksr("preview", f"{shards}/*.tar", "-o", tmp_path / "a.png", "--degradation", foreign)
    assert refused.exit_code == 1
    assert "may not be instantiated" in refused.output
