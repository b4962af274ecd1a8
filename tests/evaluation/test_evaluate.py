import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import evaluate
from ksr_distill.degradation import JPEGDegradation
from ksr_distill.evaluation import command
from ksr_distill.evaluation.benchmark_images import write_image
from ksr_distill.evaluation.config import EvaluationConfig
from ksr_distill.evaluation.feature_network import FeatureNetwork
from ksr_distill.overrides import check_overrides
from tests.evaluation.conftest import photo

CONF = Path(evaluate.CONF) / "evaluation"


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("evaluate", list(overrides)), resolve=True)


def run(*overrides):
    return command.evaluate(
        config(*overrides), to_folder=lambda path: path, load_recipe=evaluate.load_recipe
    )


def test_every_key_of_evaluate_yaml_is_read():
    assert set(config()) == {field.name for field in fields(EvaluationConfig)}


def test_one_command_writes_numbers_and_a_report(pairs, tmp_path, student_folder, teacher_folder):
    report = run(
        f"model={student_folder}",
        f"teacher={teacher_folder}",
        f"benchmark={pairs}",
        "num_images=1",
        f"output_dir={tmp_path / 'out'}",
    )
    assert report == tmp_path / "out" / "report.html"
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(document["models"]) == [
        *("nearest", "bicubic", "lanczos", "student", "teacher_1", "teacher_5")
    ]
    assert document["settings"]["Border"].startswith("2 px")
    assert document["settings"]["config"]["seed"] == 0
    assert (tmp_path / "out" / "per_image.csv").read_text().count("\n") == 7


def test_weights_are_given_by_path(pairs, tmp_path):
    torch.manual_seed(0)
    torch.save(FeatureNetwork("alex").state_dict(), tmp_path / "alexnet.pth")
    run(
        f"benchmark={pairs}",
        "baselines=[nearest,bicubic]",
        f"lpips_weights={tmp_path / 'alexnet.pth'}",
        f"feature_weights={tmp_path / 'alexnet.pth'}",
        "crop_px=32",
        f"output_dir={tmp_path / 'out'}",
    )
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["models"]["nearest"]["lpips"] > 0
    assert "crops are too few" in document["models"]["nearest"]["kid"]


def test_photos_are_degraded_by_a_recipe_of_conf(tmp_path, student_folder):
    write_image(photo(), tmp_path / "photos" / "a.png")
    run(
        f"model={student_folder}",
        f"benchmark={tmp_path / 'photos'}",
        "degradation=jpeg",
        f"output_dir={tmp_path / 'out'}",
    )
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["settings"]["Lowres"] == "recipe jpeg"


def test_pictures_without_originals_make_a_report_of_what_can_be_said(pairs, tmp_path):
    for path in pairs.glob("*_HR.png"):
        path.unlink()
    report = run(f"lowres={pairs}", "degradation=bicubic", f"output_dir={tmp_path / 'out'}")
    text = report.read_text()
    assert "output under recipe bicubic against the stored lowres" in text
    assert "PSNR-Y" not in text
    assert "error on the right" not in text


def test_a_recipe_is_told_by_its_name_and_gets_the_scale():
    recipe = evaluate.load_recipe("jpeg", 4)
    assert isinstance(recipe, JPEGDegradation)
    assert recipe.scale == 4
    with pytest.raises(ValueError, match=r"degradation=jpg is no recipe.*use bicubic, jpeg"):
        evaluate.load_recipe("jpg", 2)


def test_photos_without_a_recipe_are_refused_before_a_model_is_loaded(tmp_path):
    write_image(photo(), tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match="degradation is not set, and there are no pairs"):
        run("model=missing", f"benchmark={tmp_path / 'photos'}")


def test_a_folder_called_like_a_config_group_is_a_folder():
    # conf/ has groups called model and degradation; evaluate.py must not mistake a path for one.
    overrides = ["model=outputs/ksr_flash/export", "degradation=bicubic", "benchmark=photos"]
    check_overrides("evaluate", overrides, CONF)
    assert config(*overrides)["model"] == "outputs/ksr_flash/export"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_images=abc", "num_images='abc' is not allowed; use a whole number ≥ 1 or null"),
        ("seed=-1", "seed=-1 is not allowed; use a whole number ≥ 0"),
        ("border_px=2.5", "border_px=2.5 is not allowed"),
        ("judged=student", "judged=student is not among nearest, bicubic, lanczos"),
        ("sort_by=psnr", "sort_by='psnr' is no metric"),
        ("curves=missing.csv", "curves=missing.csv is no file"),
        ("lpips_weights=missing.pth", "lpips_weights=missing.pth is no file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(override, message, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(f"benchmark={pairs}", f"output_dir={tmp_path / 'out'}", override)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(ValueError, match="benchmrk is no key of the config; did you mean bench"):
        check_overrides("evaluate", ["benchmrk=x"], CONF)


def test_the_quickstarts_experiment_composes_and_its_curves_are_a_runs():
    quickstart = config("+experiment=quickstart")
    assert quickstart["curves"] == "outputs/quickstart/student/metrics.csv"
    assert quickstart["output_dir"] == "outputs/quickstart"
