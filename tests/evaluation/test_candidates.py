import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ksr_distill.evaluation.candidates import candidates, check_names, sweep_runs
from ksr_distill.evaluation.config import EvaluationConfig
from ksr_distill.evaluation.upscalers import ModelSpec

CONF = Path(__file__).parents[2] / "conf/evaluation/evaluate.yaml"


def config(**changes):
    return EvaluationConfig.of(OmegaConf.to_object(OmegaConf.load(CONF)) | changes)


def same(path):
    return path


def make_run(folder, num_steps, *, as_checkpoint=False):
    run = folder / ("checkpoints" if as_checkpoint else "export")
    run.mkdir(parents=True)
    if as_checkpoint:
        (run / "best.ckpt").touch()
    index = {"student_timesteps": list(range(num_steps))}
    (run / "model_index.json").write_text(json.dumps(index))


def test_a_folder_is_named_after_its_run(tmp_path):
    make_run(tmp_path / "ksr_flash", 4)
    path = tmp_path / "ksr_flash" / "export"
    assert candidates(config(model=str(path)), same) == [ModelSpec("ksr_flash", path)]


def test_a_checkpoint_is_turned_into_a_folder_and_named_after_its_run(tmp_path):
    make_run(tmp_path / "ksr_flash", 4, as_checkpoint=True)
    path = tmp_path / "ksr_flash" / "checkpoints" / "best.ckpt"
    (spec,) = candidates(config(model=str(path)), lambda p: tmp_path / f"exported-{p.stem}")
    assert spec == ModelSpec("ksr_flash", tmp_path / "exported-best")


def test_entries_may_say_everything_or_only_a_path(tmp_path):
    entry = {"name": "t", "path": str(tmp_path), "sampler": "ddim", "num_inference_steps": 100}
    specs = candidates(config(models=[entry, str(tmp_path)]), same)
    assert specs == [ModelSpec("t", tmp_path, "ddim", 100), ModelSpec(tmp_path.name, tmp_path)]


def test_a_teacher_is_sampled_once_for_each_number(tmp_path):
    specs = candidates(config(teacher=str(tmp_path)), same)
    assert [(s.name, s.sampler, s.num_inference_steps) for s in specs] == [
        ("teacher_1", "ddim", 1),
        ("teacher_5", "ddim", 5),
    ]


def test_a_sweeps_runs_are_named_by_their_steps_and_sorted(tmp_path):
    for num_steps in (8, 1, 4):
        make_run(tmp_path / f"run_{num_steps:02d}x", num_steps, as_checkpoint=num_steps == 4)
    (tmp_path / "multirun.yaml").touch()
    specs = sweep_runs(tmp_path, lambda p: p.parent if p.is_file() else p)
    assert [spec.name for spec in specs] == ["student_1", "student_4", "student_8"]
    assert specs[1].path == tmp_path / "run_04x" / "checkpoints"


def test_runs_of_equal_steps_keep_their_folders_names(tmp_path):
    for name in ("seed=0", "seed=1"):
        make_run(tmp_path / name, 4)
    assert [spec.name for spec in sweep_runs(tmp_path, same)] == ["seed=0", "seed=1"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no run with export/ or checkpoints/best\.ckpt"):
        sweep_runs(tmp_path, same)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        sweep_runs(tmp_path / "nowhere", same)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pth": "x"}, "an entry with pth; allowed are name, path, sampler"),
        ({"name": "x"}, "an entry without path"),
    ],
)
def test_misspelt_entries_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        candidates(config(models=[entry]), same)


def test_comparisons_with_a_stranger_are_refused_before_anything_runs():
    judged = config(judged="student")
    check_names(judged, ["bicubic", "student"])
    with pytest.raises(ValueError, match="judged=student is not among bicubic, teacher"):
        check_names(judged, ["bicubic", "teacher"])
    with pytest.raises(ValueError, match="nothing to compare"):
        check_names(judged, [])
