import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks.ship_model import card_of
from ksr_distill.cli import app
from ksr_distill.export import blend_students, model_card, read_checkpoint
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders import bundled
from ksr_distill.models import KSRUNet

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def exported_card():
    record = {
        "kind": "student", "student_timesteps": [979], "scale": 2, "update": 3,
        "config": {"name": "tiny", "data": {}},
    }  # fmt: skip
    weights = {"student_ema.weight": torch.zeros(1)}
    return model_card({"ksr": record, "state_dict": weights}, Path("last.ckpt"), None)


def shipped_card():
    facts = {"what": "a student", "data": "Noise.", "commands": [], "commit": "abc", "note": "",
             "section": "x2", "numbers": "student"}  # fmt: skip
    return card_of("tiny", facts, {})


@pytest.mark.parametrize("card_from", [exported_card, shipped_card])
def test_a_card_begins_with_what_the_hub_reads_and_the_licence_of_the_project(card_from):
    before, front, text = card_from().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert not before
    assert facts["license"] == PROJECT["license"].lower()
    assert facts["library_name"] == "diffusers"
    assert facts["pipeline_tag"] == "image-to-image"
    assert text.startswith("\n# tiny: ")


TINY = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": (1, 1),
        "time_embedding_dim": 16, "num_groups": 4}  # fmt: skip


def student(folder, seed, timesteps=(979, 479), **changes):
    torch.manual_seed(seed)
    pipeline = KSRFlashPipeline(KSRUNet(**{**TINY, **changes}), student_timesteps=list(timesteps))
    pipeline.save_pretrained(folder)
    return folder


def weights_of(folder):
    return KSRFlashPipeline.from_pretrained(folder).sr.state_dict()


def test_a_blend_lies_between_two_students_by_weight(tmp_path):
    one, other = (student(tmp_path / str(seed), seed) for seed in range(2))
    blend_students(one, other, tmp_path / "mixed", share=0.25, overwrite=False)
    first, second, mixed = (weights_of(tmp_path / name) for name in ("0", "1", "mixed"))
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
    index = KSRFlashPipeline.from_pretrained(tmp_path / "mixed").config
    assert index["student_timesteps"] == [979, 479]
    assert "0.75 of 0 and 0.25 of 1" in (tmp_path / "mixed" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "share", "message"),
    [
        ({}, 1.5, "--share 1.5 is outside 0…1"),
        ({"num_groups": 2}, 0.5, "has model.num_groups=2, "),
        ({"timesteps": (979,)}, 0.5, "has student_timesteps="),
    ],
)
def test_students_that_do_not_fit_are_not_blended(tmp_path, changes, share, message):
    one, other = student(tmp_path / "one", 0), student(tmp_path / "other", 1, **changes)
    with pytest.raises(ValueError, match=message):
        blend_students(one, other, tmp_path / "mixed", share=share, overwrite=False)
    assert not (tmp_path / "mixed").exists()


def blend_command(*arguments):
    return CliRunner().invoke(app, ["blend", *map(str, arguments)])


def test_what_is_no_students_folder_is_not_blended(tmp_path):
    one, teacher = student(tmp_path / "one", 0), tmp_path / "teacher"
    KSRTeacherPipeline(KSRUNet(**TINY)).save_pretrained(teacher)
    for other, message in (
        (tmp_path, f"{tmp_path} is no model folder"),
        (tmp_path / "no", f"SECOND {tmp_path / 'no'} is no model folder"),
        (teacher, f"{teacher} holds a KSRTeacherPipeline"),
    ):
        result = blend_command(one, other, tmp_path / "mixed")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {message}")
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "mixed").exists()


def test_students_of_the_package_are_blended_by_name(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    for name in ("mini_x2", "mini_x4"):
        student(tmp_path / "assets" / name, 0)
    monkeypatch.setattr(bundled, "files", lambda name: tmp_path)
    result = blend_command("mini_x2", "mini_x4", tmp_path / "mixed")
    assert result.exit_code == 0, result.stderr
    assert "0.5 of mini_x2 and 0.5 of mini_x4" in (tmp_path / "mixed" / "README.md").read_text()


def test_a_checkpoint_that_is_not_there_points_at_the_last_one(tmp_path):
    with pytest.raises(ValueError, match=r"is no file; .* e\.g\. outputs/NAME/checkpoints"):
        read_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"best.ckpt is no file; .* there is .*last\.ckpt"):
        read_checkpoint(tmp_path / "best.ckpt")
