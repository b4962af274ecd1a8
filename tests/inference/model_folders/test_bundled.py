import shutil
import subprocess
import sys

import PIL.Image
import pytest
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.inference.model_folders import bundled


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package without models."""
    package = tmp_path / "package"
    (package / "assets").mkdir(parents=True)
    monkeypatch.setattr(bundled, "files", lambda name: package)
    return package


def bring(package, *names, like):
    for name in names:
        shutil.copytree(like, package / "assets" / name)


def test_a_model_of_the_package_goes_by_its_name(package, model_folder):
    bring(package, "mini_x2", like=model_folder)
    assert bundled.find_model("mini_x2") == package / "assets" / "mini_x2"


def test_finding_a_model_loads_no_torch():
    script = (
        "import sys; from ksr_distill.inference import find_model; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_folder_on_the_disk_goes_by_its_path(package, model_folder):
    assert bundled.find_model(str(model_folder)) == model_folder


def test_the_scale_chooses_the_student_and_where_it_is_missing_the_doubling_one_is_repeated(
    package, model_folder
):
    bring(package, "mini_x2", like=model_folder)
    assert bundled.default_student(4).name == "mini_x2"
    bring(package, "mini_x4", like=model_folder)
    expected = {1: 2, 1.5: 2, 2: 2, 3: 2, 4: 4, 8: 2, 16: 4}
    assert {s: bundled.default_student(s).name for s in expected} == {
        scale: f"mini_x{factor}" for scale, factor in expected.items()
    }


def test_a_package_without_models_says_what_to_do(package):
    with pytest.raises(ValueError, match="--model FOLDER"):
        bundled.default_student(2)
    with pytest.raises(ValueError, match=r"mini_x3 is no model folder.*none is installed"):
        bundled.find_model("mini_x3")


def test_an_unknown_name_is_answered_by_those_there_are(package, model_folder):
    bring(package, "mini_x2", "mini_x2_teacher", like=model_folder)
    with pytest.raises(ValueError, match=r"\(mini_x2, mini_x2_teacher\)"):
        bundled.find_model("mini")


def test_a_photo_is_enlarged_without_naming_a_model_or_a_file(package, model_folder, tmp_path):
    bring(package, "mini_x2", like=model_folder)
    PIL.Image.new("RGB", (20, 12), "teal").save(tmp_path / "photo.jpg")
    result = CliRunner().invoke(
        app, ["upscale", str(tmp_path / "photo.jpg"), "--device", "cpu", "--scale", "3"]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "photo_x3.jpg")
    assert PIL.Image.open(tmp_path / "photo_x3.jpg").size == (60, 36)
