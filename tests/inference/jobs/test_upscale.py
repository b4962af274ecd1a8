"""``ksr upscale`` as a user runs it, but in this process: imports are paid once."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.cli.progress import UpscaleProgress
from ksr_distill.cli.upscale import _run_all
from ksr_distill.inference import KSRTeacherPipeline
from ksr_distill.inference.jobs import estimate, upscale, workspace
from ksr_distill.inference.jobs.planning import Shard, default_out, plan_jobs
from ksr_distill.inference.model_folders.loading import load_pipeline
from ksr_distill.inference.tiling.tiles import plan_tiles
from tests.inference.pictures.test_pictures import broken_files

RGB = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    PIL.Image.fromarray(RGB).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def ksr(model_folder):
    def run(*arguments):
        defaults = ["--model", str(model_folder), "--device", "cpu"]
        return CliRunner().invoke(app, ["upscale", *defaults, *map(str, arguments)])

    return run


def read(path):
    return np.asarray(PIL.Image.open(path))


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_it_makes_what_the_pipeline_makes_and_prints_where(ksr, photo, tmp_path, model_folder):
    result = ksr(photo, "-o", tmp_path / "big.png", "--scale", 3, "--seed", 7)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(tmp_path / "big.png")
    pipeline = load_pipeline(model_folder, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    (expected,) = pipeline(PIL.Image.open(photo), scale=3, generator=generator).images
    np.testing.assert_array_equal(read(tmp_path / "big.png"), np.asarray(expected))


def test_the_plan_comes_first(ksr, photo, tmp_path):
    result = ksr(photo, "-o", tmp_path / "big.png", "--scale", 4)
    assert "photo.png: 28×20 → 112×80 px in 2 passes, 2 tiles" in result.stderr
    assert "of memory, up to" in result.stderr


def test_a_dry_run_prints_the_time_too_and_makes_nothing(ksr, photo, tmp_path):
    before = names(tmp_path)
    result = ksr(photo, "-o", tmp_path / "new" / "big.png", "--dry-run", "--scale", 16)
    assert result.exit_code == 0
    assert "448×320 px in 4 passes" in result.stderr
    assert "about" in result.stderr
    assert result.stdout == ""
    assert names(tmp_path) == before


def test_a_folder_keeps_its_tree_and_one_bad_file_does_not_stop_the_rest(ksr, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png", "deep/c.bmp"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "notes.txt").write_text("no picture either, and left alone")
    result = ksr(tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert names(tmp_path / "out") == ["a.jpg", "deep/b.png", "deep/c.png"]
    assert read(tmp_path / "out" / "deep" / "c.png").shape == (40, 56, 3)
    assert "bad.jpg cannot be read as a picture" in result.stderr
    assert "3 done, 0 skipped, 1 failed" in result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out")


def test_skip_existing_leaves_finished_pictures_alone(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    (tmp_path / "out" / "a.png").write_text("finished")
    result = ksr(tmp_path / "in", "-o", tmp_path / "out", "--skip-existing")
    assert result.exit_code == 0
    assert (tmp_path / "out" / "a.png").read_text() == "finished"
    assert "1 done, 1 skipped, 0 failed" in result.stderr


def test_shards_split_a_folder_without_rest_or_overlap(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abcde":
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / f"{name}.png")
    for part in range(2):
        assert (
            ksr(tmp_path / "in", "-o", tmp_path / f"out{part}", "--shard", f"{part}/2").exit_code
            == 0
        )
    assert names(tmp_path / "out0") == ["a.png", "c.png", "e.png"]
    assert names(tmp_path / "out1") == ["b.png", "d.png"]


def test_a_torn_picture_among_those_to_compare_is_one_line(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    PIL.Image.fromarray(RGB).save(tmp_path / "in" / "a.png")
    whole = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "out" / "a.png").write_bytes(whole[: len(whole) // 2])
    result = ksr(tmp_path / "in", "-o", tmp_path / "out", "--compare", "--skip-existing")
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert f"{tmp_path / 'out' / 'a.png'} cannot be read as a picture" in line


def test_compare_writes_one_page_with_everything_in_it(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    result = ksr(tmp_path / "in", "-o", tmp_path / "out", "--compare")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert "http" not in page
    assert "56 × 40" in page
    assert str(tmp_path / "out" / "report.html") in result.stdout


def test_same_seed_same_file_and_another_seed_another(ksr, photo, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ksr(photo, "-o", tmp_path / f"{name}.png", "--seed", seed)
    assert np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))
    assert not np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "c.png"))


@pytest.mark.parametrize(
    "name", ["truncated.jpg", "truncated.png", "text.png", "zero.png", "bomb.png"]
)
def test_a_broken_file_is_one_line_and_leaves_nothing(ksr, tmp_path, name):
    (tmp_path / name).write_bytes(broken_files(tmp_path)[name])
    result = ksr(tmp_path / name, "-o", tmp_path / "out" / "big.png")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert name in result.stderr
    assert not (tmp_path / "out").exists()
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale", "0.5"), "scale=0.5 is no enlargement"),
        (("--scale", "1e300"), "scale=1e+300 is no enlargement"),
        (("--scale", "1e9"), "holds 2147483647 px a side, but the output is 28000000000×"),
        (("--max-megapixels", "nan"), "megapixels, more than nan"),
        (("--refine-steps", "1"), "needs a refiner, movq and context"),
        (("--bits", "12"), "--bits 12 is not one of 8, 16"),
        (("--format", "xcf"), "--format xcf is not one of png, jpg"),
        (("--format", "jpg"), "big.png and --format jpg disagree"),
        (("--shard", "3/3"), "--shard 3/3 is not i/n"),
        (("--device", "cuda:77"), "--device cuda:77 is not usable here"),
        (("--device", "meta"), "--device meta is not usable here"),
        (("--device", "hpu"), "--device hpu is not usable here"),
        (("--device", "privateuseone"), "--device privateuseone is not usable here"),
        (("--tile", "1"), "tile=1 is not a multiple of 2"),
        (("--overlap", "900"), "overlap=900 is outside"),
    ],
)
def test_a_wrong_option_is_one_line_with_its_value(ksr, photo, tmp_path, arguments, message):
    result = ksr(photo, "-o", tmp_path / "out" / "big.png", *arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--tile", "0"), ("--steps", "0"), ("--overlap", "-1"), ("--seed", "1" + "0" * 19)],
)
def test_a_number_outside_its_range_is_not_taken_for_the_default(ksr, photo, tmp_path, arguments):
    result = ksr(photo, "-o", tmp_path / "out" / "big.png", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_option_is_said_once_and_not_for_each_picture(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    result = ksr(tmp_path / "in", "-o", tmp_path / "out", "--tile", 64, "--overlap", 40)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: overlap=40 is outside 0…16, a quarter of the tile; use 8"
    ]


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("photo.jpg", None, "photo_x1.5.jpg"),
        ("photo.GIF", None, "photo_x1.5.png"),
        ("photo", None, "photo_x1.5.png"),
        ("photo.jpg", "tif", "photo_x1.5.tif"),
        ("v1.0", None, "v1.0_x1.5"),
        ("v1.0/deep/..", None, "v1.0_x1.5"),
    ],
)
def test_without_a_target_there_is_a_name_that_can_be_written(tmp_path, source, name, expected):
    (tmp_path / "v1.0" / "deep").mkdir(parents=True)
    assert default_out(tmp_path / source, 1.5, name=name) == tmp_path / expected


def test_no_picture_of_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("a.png", "a.bmp", "a.ppm"):
        PIL.Image.fromarray(RGB).save(tmp_path / name)
    jobs = plan_jobs(tmp_path, tmp_path / "out", name=None)
    assert [job.target.name for job in jobs] == ["a.bmp.png", "a.png", "a.ppm.png"]
    PIL.Image.fromarray(RGB).save(tmp_path / "a.bmp.png")
    with pytest.raises(ValueError, match=r"a\.bmp and .*a\.bmp\.png would both become .*; rename"):
        plan_jobs(tmp_path, tmp_path / "out", name=None)


@pytest.mark.parametrize(("source", "out"), [("in", "."), ("in/s", "in"), ("in/s/..", ".")])
def test_a_folder_may_be_enlarged_into_one_that_it_lies_in(tmp_path, monkeypatch, source, out):
    (tmp_path / "in" / "s").mkdir(parents=True)
    PIL.Image.fromarray(RGB).save(tmp_path / "in" / "s" / "a.png")
    monkeypatch.chdir(tmp_path)
    (job,) = plan_jobs(Path(source), Path(out), name=None)
    assert job.source.samefile("in/s/a.png")
    assert job.target == Path(out) / job.source.relative_to(source)


@pytest.mark.parametrize("out", ["in/big", "in/../in/big", "{here}/in/big", "link/big"])
def test_what_lies_in_the_output_is_no_source_however_the_output_is_written(
    tmp_path, monkeypatch, out
):
    (tmp_path / "in" / "big").mkdir(parents=True)
    for name in ("a.png", "big/a.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    (job,) = plan_jobs(Path("in"), Path(out.format(here=tmp_path)), name=None)
    assert job.source == Path("in/a.png")


def test_two_deepzooms_of_which_one_would_lie_in_the_other_are_refused_at_once(ksr, tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    for name in ("a.png", "x.png", "x/z.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / "in" / name)
    result = ksr(tmp_path / "in", "-o", tmp_path / "out", "--format", "dz")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/in/x.png would become {tmp_path}/out/x, a folder that "
        f"{tmp_path}/in/x/z.png is to lie in; rename one, or use another --format"
    ]
    assert not (tmp_path / "out").exists()


def test_a_folder_is_searched_for_what_browsers_and_phones_save(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.heif", "d.pbm", "e.txt"):
        (tmp_path / name).touch()
    jobs = plan_jobs(tmp_path, tmp_path / "out", name=None)
    assert [job.target.name for job in jobs] == ["a.png", "b.png", "c.png", "d.png"]


def test_a_folder_without_pictures_is_an_error(ksr, tmp_path):
    (tmp_path / "in").mkdir()
    result = ksr(tmp_path / "in", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "in has no pictures in it" in result.stderr


def test_a_source_that_is_not_there_and_a_model_that_is_none(ksr, photo, tmp_path):
    assert "No such file" in ksr(tmp_path / "nothing.png", "-o", tmp_path / "big.png").stderr
    command = ["upscale", str(photo), "-o", str(tmp_path / "b.png"), "--model", str(tmp_path)]
    assert "is no model folder" in CliRunner().invoke(app, command).stderr


def test_a_picture_is_not_overwritten_by_its_enlargement(ksr, photo):
    result = ksr(photo, "-o", photo)
    assert result.exit_code == 1
    assert "photo.png would be overwritten by its enlargement; use another -o" in result.stderr


def test_a_picture_is_not_overwritten_by_the_enlargement_of_another(ksr, tmp_path):
    (tmp_path / "s" / "s").mkdir(parents=True)
    for name in ("s/a.png", "s/s/a.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / name)
    result = ksr(tmp_path / "s", "-o", tmp_path)
    assert result.exit_code == 1
    whose = f"the enlargement of {tmp_path}/s/s/a.png"
    assert f"s/a.png would be overwritten by {whose}; use another -o" in result.stderr
    assert names(tmp_path) == ["s/a.png", "s/s/a.png"]


def test_a_target_that_cannot_be_written_is_one_line(ksr, photo, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = ksr(photo, "-o", tmp_path / "file" / "big.png")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file'} is no folder; use another -o" in result.stderr.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_full_disk_is_refused_with_numbers_before_the_work(
    ksr, photo, tmp_path, monkeypatch, is_streamed
):
    monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0 if is_streamed else 10**9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = ksr(photo, "-o", tmp_path / "out" / "big.png")
    assert result.exit_code == 1
    assert "has 1 KB free, but the job needs up to" in result.stderr
    assert names(tmp_path) == ["photo.png"]


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small disk"
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_disk_that_fills_up_leaves_no_half_file(ksr, tmp_path, monkeypatch, is_streamed):
    monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0 if is_streamed else 10**9)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        noisy = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        PIL.Image.fromarray(noisy).save(tmp_path / "photo.png")
        monkeypatch.setattr(upscale, "check_disk", lambda folder, needed: None)
        result = ksr(tmp_path / "photo.png", "-o", disk / "big.png")
        assert result.exit_code == 1
        assert len([x for x in result.stderr.splitlines() if x.startswith("error: ")]) == 1
        kept = [name for name in names(disk) if not name.startswith(".big.png.ksr-work/")]
        assert kept == []  # finished tiles stay, for when there is room again
        assert bool(names(disk)) == is_streamed
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Code:
    """What a hostile file holds: unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def damage_model(folder, damage, proof):
    weights = next((folder / "sr").glob("*.safetensors"))
    config, tensors = folder / "sr" / "config.json", load_file(weights)
    if damage == "a config of wrong shapes":
        config.write_text(config.read_text().replace('"base_channels": 8', '"base_channels": 16'))
    elif damage == "a tensor of a wrong shape":
        save_file(tensors | {"conv_out.bias": torch.zeros(4)}, weights)
    elif damage == "a tensor too many":
        save_file(tensors | {"more": torch.zeros(4)}, weights)
    elif damage == "a tensor too few":
        save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, weights)
    elif damage == "not numbers":
        save_file(tensors | {"conv_out.bias": torch.full((3,), torch.nan)}, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "code in a pickle":
        weights.unlink()
        torch.save({"unet": Code(proof)}, folder / "sr" / "diffusion_pytorch_model.bin")
    elif damage == "code in the index":
        change(folder / "model_index.json", {"sr": ["os", "system"]})
    elif damage == "a folder for weights":
        weights.unlink()
        weights.mkdir()


def change(file, changes):
    """Write a JSON file anew: an object with changes, or what is no object."""
    is_object = isinstance(changes, dict)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if is_object else changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a config of wrong shapes", "of another shape (conv_in.bias is (8,), not (16,)"),
        ("a tensor of a wrong shape", "conv_out.bias is (4,), not (3,)"),
        ("a tensor too many", "1 unknown (more)"),
        ("a tensor too few", "1 missing (conv_out.bias)"),
        ("not numbers", "has places that are not numbers"),
        ("truncated", "diffusion_pytorch_model.safetensors cannot be read"),
        ("a folder for weights", "diffusion_pytorch_model.safetensors is a folder"),
        ("code in a pickle", "lacks its config.json or its safetensors file"),
        ("code in the index", "sr is a system, not one of"),
    ],
)
def test_a_damaged_or_hostile_model_folder_is_one_line(
    photo, tmp_path, model_folder, damage, message
):
    shutil.copytree(model_folder, tmp_path / "model")
    proof = tmp_path / "it_ran"
    damage_model(tmp_path / "model", damage, proof)
    command = ["upscale", str(photo), "-o", str(tmp_path / "out" / "b.png"), "--model",
               str(tmp_path / "model"), "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not proof.exists()
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", None, "model_index.json holds None, not an object"),
        ("model_index.json", {"_class_name": []}, "model_index.json names the class []"),
        ("model_index.json", {"sr": "x"}, "model_index.json has sr='x', not [library, class]"),
        ("model_index.json", {"student_timesteps": [979, "x"]}, "student_timesteps=[979, 'x'] are"),
        ("sr/config.json", [], "sr/config.json holds [], not an object"),
        (
            "sr/config.json",
            {"num_groups": 0},
            "sr/config.json gives no KSRUNet: model.num_groups=0",
        ),
        (
            "sr/config.json",
            {"num_blocks": [10**9, 1]},
            "sr/config.json gives no KSRUNet: model.num",
        ),
        ("sr/config.json", {"base_channels": -8}, "gives the channels [-8, -8, -16]"),
        ("sr/config.json", {"base_channels": 2**40}, "sr/config.json gives no KSRUNet: "),
    ],
)
def test_an_index_or_a_config_that_is_none_is_one_line(
    photo, tmp_path, model_folder, file, changes, message
):
    shutil.copytree(model_folder, tmp_path / "model")
    change(tmp_path / "model" / file, changes)
    command = ["upscale", str(photo), "-o", str(tmp_path / "b.png"), "--model"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "model"), "--device", "cpu"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_checkpoint_is_no_model_folder(photo, tmp_path):
    torch.save({"unet": Code(tmp_path / "it_ran")}, tmp_path / "evil.ckpt")
    command = ["upscale", str(photo), "-o", str(tmp_path / "b.png"), "--model"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "evil.ckpt")])
    assert result.exit_code == 1
    assert "evil.ckpt is no model folder" in result.stderr
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that root cannot write")
def test_a_folder_that_cannot_be_written_is_one_line(ksr, photo):
    result = ksr(photo, "-o", "/proc/ksr/big.png")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "/proc/ksr" in line


def test_a_teachers_folder_is_used_like_a_students(ksr, photo, tmp_path, unet):
    teacher = KSRTeacherPipeline(unet, num_inference_steps=2, window_px=32, stride_px=24)
    teacher.save_pretrained(tmp_path / "teacher")
    options = ("--model", tmp_path / "teacher", "--seed", 7, "--scale", 3, "--fp32")
    result = ksr(photo, "-o", tmp_path / "big.png", *options)
    assert result.exit_code == 0, result.stderr
    loaded = load_pipeline(tmp_path / "teacher", device=torch.device("cpu"), fp32=True)
    generator = torch.Generator().manual_seed(7)
    (expected,) = loaded(PIL.Image.open(photo), scale=3, generator=generator).images
    np.testing.assert_array_equal(read(tmp_path / "big.png"), np.asarray(expected))

    refused = ksr(photo, "-o", tmp_path / "no.png", *options, "--refine-steps", 1)
    assert refused.exit_code == 1
    assert "--refine-steps and --match-colours belong to a student's folder" in refused.stderr
    other_steps = ksr(photo, "-o", tmp_path / "other.png", *options, "--steps", 1)
    assert other_steps.exit_code == 0
    assert not np.array_equal(read(tmp_path / "other.png"), np.asarray(expected))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_streamed_and_in_memory_are_the_same_file(ksr, photo, tmp_path, monkeypatch, suffix):
    options = ("--scale", 6, "--tile", 64)
    ksr(photo, "-o", tmp_path / f"memory.{suffix}", *options)
    monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0)
    ksr(photo, "-o", tmp_path / f"streamed.{suffix}", *options)
    first, second = (tmp_path / f"{name}.{suffix}" for name in ("memory", "streamed"))
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_tiles_took_is_returned_before_a_large_file_is_written(
    ksr, photo, tmp_path, monkeypatch
):
    order = []
    write = upscale.write_picture
    monkeypatch.setattr(upscale, "return_freed_memory", lambda: order.append("returned"))
    monkeypatch.setattr(
        upscale,
        "write_picture",
        lambda *args, **how: (order.append("written"), write(*args, **how)),
    )
    ksr(photo, "-o", tmp_path / "small.png")
    monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0)
    ksr(photo, "-o", tmp_path / "large.png")
    assert order == ["written", "returned", "written"]


WORKER = """
import sys, time
from ksr_distill.cli import app
from ksr_distill.cli.progress import UpscaleProgress
from ksr_distill.cli.upscale import _run_all
from ksr_distill.inference.jobs import estimate, workspace
estimate.STREAM_ABOVE_PX = 0
write = workspace.TileFile.write
def slow_write(self, index, pixels):
    write(self, index, pixels)
    print("tile", flush=True)
    time.sleep(0.05)
workspace.TileFile.write = slow_write
app(sys.argv[1:])
"""
EIGHTFOLD = ("--scale", "8", "--tile", "64", "--device", "cpu")


def start_worker(model_folder, photo, out, *arguments):
    command = [sys.executable, "-c", WORKER, "upscale", str(photo), "-o", str(out), "--model",
               str(model_folder), *EIGHTFOLD, *arguments]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def counted_writes(monkeypatch):
    """Stream everything, and list the tiles that this process makes."""
    monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0)
    made = []
    write = workspace.TileFile.write

    def counted(self, index, pixels):
        made.append(index)
        write(self, index, pixels)

    monkeypatch.setattr(workspace.TileFile, "write", counted)
    return made


def test_a_killed_job_goes_on_where_it_was_to_the_same_file(
    ksr, model_folder, photo, tmp_path, counted_writes
):
    assert ksr(photo, "-o", tmp_path / "whole.png", *EIGHTFOLD).exit_code == 0
    num_tiles = len(counted_writes)
    counted_writes.clear()
    process = start_worker(model_folder, photo, tmp_path / "big.png")
    for _ in range(num_tiles // 2):
        assert process.stdout.readline() == "tile\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "big.png").exists()
    (journal,) = (tmp_path / ".big.png.ksr-work").glob("pass0*.journal")
    with journal.open("ab") as torn:
        torn.write(b"1")  # as if the kill had come in the middle of a line

    result = ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD)

    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "big.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert 0 < len(counted_writes) <= num_tiles - num_tiles // 2
    assert names(tmp_path) == ["big.png", "photo.png", "whole.png"]


def test_tiles_on_disk_are_kept_when_other_ones_would_fit(ksr, photo, tmp_path, counted_writes):
    def fails_at_the_tenth(self, index, pixels):
        if len(counted_writes) == 10:
            raise OSError("no space left")
        write(self, index, pixels)

    write = workspace.TileFile.write
    arguments = (photo, "-o", tmp_path / "big.png", "--scale", "8")
    with pytest.MonkeyPatch.context() as first:
        first.setattr(upscale, "largest_fitting_tile", lambda *_: 64)
        first.setattr(workspace.TileFile, "write", fails_at_the_tenth)
        assert ksr(*arguments).exit_code == 1
    with pytest.MonkeyPatch.context() as second:
        second.setattr(upscale, "largest_fitting_tile", lambda *_: 128)
        assert ksr(*arguments).exit_code == 0
    num_tiles = len(counted_writes)
    assert ksr(photo, "-o", tmp_path / "whole.png", *EIGHTFOLD).exit_code == 0
    assert len(counted_writes) == 2 * num_tiles  # none was made twice
    assert (tmp_path / "big.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_the_speed_is_measured_once_for_a_folder(ksr, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(estimate, "measure_speed", lambda passes: measured.append(1) or [1e-6])
    for name in ("a.png", "b.png", "c.png"):
        PIL.Image.fromarray(RGB).save(tmp_path / name)
    result = ksr(tmp_path, "--dry-run")
    assert result.stderr.count("about 1 s") == 3
    assert len(measured) == 1


@pytest.mark.parametrize("is_there", [False, True])
def test_processes_that_share_a_picture_make_the_same_file(
    ksr, model_folder, photo, tmp_path, counted_writes, is_there
):
    if is_there:
        (tmp_path / "big.png").write_text("an earlier one")
    assert ksr(photo, "-o", tmp_path / "whole.png", *EIGHTFOLD).exit_code == 0
    num_tiles = len(counted_writes)
    counted_writes.clear()
    other = start_worker(model_folder, photo, tmp_path / "big.png", "--shard", "1/2")
    result = ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD, "--shard", "0/2")
    stdout, stderr = other.communicate(timeout=100)
    assert (result.exit_code, other.returncode) == (0, 0), (result.stderr, stderr)
    assert result.stdout.splitlines() == [str(tmp_path / "big.png")]
    assert set(stdout.splitlines()) == {"tile"}  # the path is said by the one that writes the file
    assert (tmp_path / "big.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert len(counted_writes) > 0
    assert stdout.count("tile\n") == num_tiles - len(counted_writes) > 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shard", ["0/2", "1/2"])
def test_a_process_that_comes_when_the_picture_is_finished_does_not_wait_for_ever(
    ksr, photo, tmp_path, counted_writes, monkeypatch, shard
):
    (tmp_path / "big.png").write_text("finished")
    monkeypatch.setattr(workspace, "MEET_SECONDS", 0)
    result = ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD, "--shard", shard)
    assert result.exit_code == 1
    assert "waiting for all 2 processes to make it anew" in " ".join(result.stderr.split())
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'big.png'} is there already, and only 1 of 2 proc")
    assert counted_writes == []
    assert names(tmp_path) == ["big.png", "photo.png"]
    assert (tmp_path / "big.png").read_text() == "finished"


@pytest.mark.parametrize("first", [(), ("--shard", "0/2")])
@pytest.mark.parametrize("second", [(), ("--shard", "1/2")])
def test_a_second_job_on_a_target_is_refused_while_the_first_runs(
    ksr, model_folder, photo, tmp_path, monkeypatch, first, second
):
    process = start_worker(model_folder, photo, tmp_path / "big.png", "--seed", "1", *first)
    assert process.stdout.readline() == "tile\n"
    process.send_signal(signal.SIGSTOP)
    kept = {path: path.read_bytes() for path in (tmp_path / ".big.png.ksr-work").glob("*.journal")}
    try:
        monkeypatch.setattr(estimate, "STREAM_ABOVE_PX", 0)
        result = ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD, "--seed", "2", *second)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            f"error: {tmp_path / 'big.png'} is being made by another process (pid {process.pid} "
            f"on {socket.gethostname()}); wait for it, or use another -o"
        )
        assert kept == {path: path.read_bytes() for path in kept}
    finally:
        process.kill()
        process.communicate()


def test_tiles_of_another_job_are_not_mixed_in(ksr, photo, tmp_path, counted_writes, monkeypatch):
    monkeypatch.setattr(upscale, "write_picture", lambda *args, **kwargs: 1 / 0)
    made = []
    for seed in (1, 1, 2):
        counted_writes.clear()
        result = ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD, "--seed", seed)
        assert isinstance(result.exception, ZeroDivisionError)
        made.append(len(counted_writes))
    assert made == [made[0], 0, made[0]]


def test_a_tile_that_was_lost_on_disk_is_made_again(
    ksr, photo, tmp_path, counted_writes, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(upscale, "write_picture", lambda *args, **kwargs: 1 / 0)
        ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD)
    tiles = next((tmp_path / ".big.png.ksr-work").glob("pass2*.tiles"))
    with tiles.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff\xff\xff")
    counted_writes.clear()
    assert ksr(photo, "-o", tmp_path / "big.png", *EIGHTFOLD).exit_code == 0
    assert counted_writes == [0]


def test_a_torn_line_does_not_pass_for_another_tile(tmp_path):
    plan = plan_tiles(64, 64, tile_px=32, overlap_px=8, align=8)
    store = workspace.TileFile(tmp_path / "pass0.tiles", plan, torch.float32)
    (tmp_path / "pass0.0.journal").write_bytes(b"1")  # a kill in the middle of a line
    again = workspace.TileFile(tmp_path / "pass0.tiles", plan, torch.float32)
    again.write(3, torch.zeros(3, 32, 32))
    store.refresh()
    assert [store.is_done(index) for index in (3, 13, 1)] == [True, False, False]


def test_one_picture_is_written_while_the_next_is_computed(model_folder, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(3):
        PIL.Image.fromarray(RGB).save(tmp_path / f"in/{i}.png")
    computed, two_are_computed = [], threading.Event()
    write, compute = upscale.write_picture, upscale.run_passes

    def run_passes(*args, **kwargs):
        computed.append(compute(*args, **kwargs))
        if len(computed) == 2:
            two_are_computed.set()
        return computed[-1]

    def write_late(*args, **kwargs):
        assert two_are_computed.wait(timeout=20)
        write(*args, **kwargs)

    monkeypatch.setattr(upscale, "run_passes", run_passes)
    monkeypatch.setattr(upscale, "write_picture", write_late)
    pipeline = load_pipeline(model_folder, device=torch.device("cpu"))
    upscaler = upscale.Upscaler(pipeline, upscale.Settings(scale=2), Shard())
    jobs = plan_jobs(tmp_path / "in", tmp_path / "out", name=None)
    assert _run_all(upscaler, jobs, num_skipped=0, at_once=2) == jobs
    assert names(tmp_path / "out") == ["0.png", "1.png", "2.png"]


def test_what_fits_is_asked_while_no_other_picture_is_computed(
    model_folder, photo, tmp_path, monkeypatch
):
    pipeline = load_pipeline(model_folder, device=torch.device("cpu"))
    upscaler = upscale.Upscaler(pipeline, upscale.Settings(scale=2), Shard())
    others_wait = []

    def fitting(*_):
        others_wait.append(upscaler.turn.locked())
        return 64

    monkeypatch.setattr(upscale, "largest_fitting_tile", fitting)
    jobs = plan_jobs(photo, tmp_path / "big.png", name=None)
    assert _run_all(upscaler, jobs, num_skipped=0) == jobs
    assert others_wait == [True]


def test_ctrl_c_ends_the_pictures_of_all_threads(tmp_path):
    class Endless:
        def __init__(self):
            self.ended = []

        def run(self, job, progress):
            try:
                while True:
                    time.sleep(0.01)
                    progress.tile_done()
            finally:
                self.ended.append(job.source.name)

    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    jobs = plan_jobs(tmp_path, tmp_path / "out", name=None)
    upscaler = Endless()
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        _run_all(upscaler, jobs, num_skipped=0, at_once=2)
    assert sorted(upscaler.ended) == ["a.png", "b.png"]


def test_long_warnings_and_names_in_brackets_stay_as_they_are(capsys):
    with UpscaleProgress(1) as progress:
        logging.getLogger("ksr_distill.inference").warning("waiting: %s", "word " * 60 + "[bold]")
        assert progress._bars.columns[0].markup is False
    assert capsys.readouterr().err == f"waiting: {'word ' * 60}[bold]\n"
