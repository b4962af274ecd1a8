"""The models that come with the package: once there is one, everything about it is checked."""

import json
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import ship_model
from benchmarks.proof_pictures import Place, original
from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.metrics import psnr_y, top_octave_power_ratio
from ksr_distill.evaluation.upscalers import ModelSpec, build_baseline, build_upscalers
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders.bundled import STUDENTS, bundled_models
from ksr_distill.inference.model_folders.loading import load_pipeline, pick_device
from ksr_distill.quickstart.path import SHIPPED_TEACHER
from ksr_distill.randomness import generator_for

CPU = pick_device("cpu")
NAMES = (SHIPPED_TEACHER, *STUDENTS.values())
FACTS = ship_model.read_json(ship_model.FACTS)
SECTIONS = ("## Data", "## How it was made", "## How good")
# Fur, a still life: held out from every training, quickstart's too.
PLACES = (Place("chelsea", 128, 64, 128, 1), Place("coffee", 200, 120, 128, 1))


@pytest.fixture(params=NAMES)
def installed(request):
    """The folder of a model of the package."""
    folder = bundled_models().get(request.param)
    if folder is None:
        pytest.skip(f"{request.param} is not in this package yet")
    return folder


def test_nothing_is_shipped_that_is_not_written_down():
    assert set(bundled_models()) <= set(FACTS) == set(NAMES)


@pytest.mark.parametrize("name", FACTS)
def test_the_commands_that_made_a_model_compose(name):
    for command in FACTS[name]["commands"]:
        words = shlex.split(command)
        if words[:2] == ["python", "train.py"]:
            with initialize_config_dir(str(ship_model.ROOT / "conf"), version_base="1.3"):
                assert compose("train", words[2:])
        else:
            assert words[:2] in (["ksr", "shards"], ["ksr", "export"], ["ksr", "blend"])


def test_a_bundled_model_loads_and_is_what_its_name_says(installed):
    pipeline = load_pipeline(installed, device=CPU)
    is_teacher = installed.name == SHIPPED_TEACHER
    assert isinstance(pipeline, KSRTeacherPipeline if is_teacher else KSRFlashPipeline)
    assert pipeline.config.scale == (4 if installed.name == STUDENTS[4] else 2)
    if not is_teacher:
        assert pipeline.config.student_timesteps == [979, 729, 479, 229]


def test_a_bundled_model_is_small_and_knows_no_path(installed):
    assert ship_model.folder_bytes(installed) <= ship_model.LARGEST_BYTES
    for path in installed.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())


def test_a_card_says_all_and_its_numbers_are_those_of_the_results(installed):
    card = (installed / "README.md").read_text(encoding="utf-8")
    facts = FACTS[installed.name]
    assert re.fullmatch(r"[0-9a-f]{7,40}", str(facts["commit"])), "write the commit of the training"
    assert all(section in card for section in SECTIONS)
    assert "| Set5 |" in card
    assert "| Set14 |" in card
    assert card == ship_model.card_of(
        installed.name, facts, ship_model.read_json(ship_model.RESULTS)
    )


@pytest.fixture
def compared(installed):
    """(ours, bicubic, original) of each place; of a teacher its estimate in one step, the mean."""
    scale = 4 if installed.name == STUDENTS[4] else 2
    is_teacher = installed.name == SHIPPED_TEACHER
    sampling = {"sampler": "ddim", "num_inference_steps": 1} if is_teacher else {}
    spec = ModelSpec("ours", installed, **sampling)
    ours = build_upscalers([spec], scale=scale, device=CPU, half=False)["ours"]
    bicubic = build_baseline("bicubic", scale=scale)
    rows = []
    for place in PLACES:
        hires = original(place)
        lowres = BicubicDegradation(scale)(hires, generator=generator_for(0))
        made = [up(lowres, generator=generator_for(0)).hires.clamp(-1, 1) for up in (ours, bicubic)]
        rows.append((*made, hires))
    return rows


@pytest.mark.parametrize("installed", [SHIPPED_TEACHER], indirect=True)
def test_the_teacher_is_closer_to_a_held_out_photo_than_bicubic(installed, compared):
    gains = [psnr_y(a, x, border_px=2) - psnr_y(b, x, border_px=2) for a, b, x in compared]
    assert float(sum(gains)) / len(gains) > 0.5


@pytest.mark.parametrize("installed", STUDENTS.values(), indirect=True)
def test_a_student_has_more_of_a_held_out_photos_detail_than_bicubic(installed, compared):
    """By PSNR it need not win: its detail is likely, not the original's."""
    for ours, bicubic, hires in compared:
        distances = [abs(1 - float(top_octave_power_ratio(one, hires))) for one in (ours, bicubic)]
        assert distances[0] < distances[1]
