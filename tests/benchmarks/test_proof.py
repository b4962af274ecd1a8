import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import proof, proof_page, proof_pictures, ship_model
from ksr_distill.evaluation.upscalers import build_baseline
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.models import KSRUNet

DOCS = Path(__file__).parents[2] / "docs"


def unet():
    torch.manual_seed(0)
    network = KSRUNet(8, channel_multipliers=(1, 2), num_blocks=(1, 1), num_groups=4,
                      time_embedding_dim=16, predict_residual=True)  # fmt: skip
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, students of one and four steps, and a set of two photos."""
    folder = tmp_path_factory.mktemp("proof")
    KSRTeacherPipeline(sr=unet()).save_pretrained(folder / "teacher")
    KSRFlashPipeline(sr=unet()).save_pretrained(folder / "four")
    KSRFlashPipeline(sr=unet(), student_timesteps=[979]).save_pretrained(folder / "one")
    (folder / "photos").mkdir()
    for number in range(2):
        picture = Image.effect_noise((72, 64), 40 + number).convert("RGB")
        picture.save(folder / "photos" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def results(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "proof.py", "--teacher", str(folders / "teacher"), "--teacher-steps", "1", "2", "10",
            "--teacher-dpm-steps", "2", "--students", str(folders / "one"), str(folders / "four"),
            "--set", f"photos={folders / 'photos'}", "--seeds", "2", "--device", "cpu", "--json",
            str(folders / "results.json"),
        ])  # fmt: skip
        proof.main()
    return json.loads((folders / "results.json").read_text())


@pytest.mark.slow
def test_every_model_is_measured_on_every_image_and_students_after_each_step(results):
    assert results["x2"]["sets"]["photos"]["num_images"] == 2
    models = results["x2"]["sets"]["photos"]["models"]
    names = ["bicubic", "teacher_1", "teacher_2", "teacher_10", "teacher_dpm_2", "student_1",
             "student_4"]  # fmt: skip
    assert list(models) == names
    assert list(models["student_4"]["after_step"]) == ["1", "2", "3", "4"]
    for values in models.values():
        assert set(proof.METRICS) <= set(values)


@pytest.mark.slow
def test_few_steps_are_drawn_several_times_and_many_once(results):
    models = results["x2"]["sets"]["photos"]["models"]
    assert models["student_4"]["seed_spread"]["psnr_y"] > 0
    assert "seed_spread" not in models["teacher_10"]
    assert "seed_spread" not in models["bicubic"]


@pytest.mark.slow
def test_the_teacher_is_sampled_by_ddim_and_as_it_was_released(results):
    models = results["x2"]["sets"]["photos"]["models"]
    assert models["teacher_2"]["psnr_y"] != models["teacher_dpm_2"]["psnr_y"]
    assert models["teacher_dpm_2"]["num_inference_steps"] == 2


@pytest.mark.slow
def test_the_command_is_written_down_as_it_was_typed(results):
    assert results["x2"]["settings"]["command"].startswith("python -m benchmarks.proof --teacher ")


def test_students_of_one_step_count_have_names_of_their_own(folders):
    four = folders / "four"
    specs = proof.model_specs([], [str(four), f"without_features={four}"], ddim_steps=[])
    assert [spec.name for spec in specs] == ["student_4", "without_features"]
    assert proof_page.in_words("without_features") == "without features"


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "docs" / "results.json"
    for section, number in (("x2", 1), ("x4", 2), ("x2", 3)):
        proof.record(file, section, {"number": number})
    assert json.loads(file.read_text()) == {"x2": {"number": 3}, "x4": {"number": 2}}


def test_a_set_of_another_scale_is_refused(tmp_path):
    for name, size in (("a_HR", (64, 64)), ("a_LR", (16, 16))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="pairs of ×4; give pairs of ×2"):
        proof.load_set(tmp_path, 2)


@pytest.mark.slow
def test_a_page_is_filled_and_stays_so_and_an_unknown_part_is_named(results):
    parts = ("how", "tables", "counts", "steps", "claims", "spread", "commands")
    page = "\n".join(f"<!-- begin x2 {part} -->\nold\n<!-- end -->" for part in parts)
    filled = proof_page.fill(page, results)
    assert "old" not in filled
    assert "| student, 4 steps |" in filled
    assert "| teacher by DPM-Solver++, 2 steps |" in filled
    assert proof_page.fill(filled, results) == filled
    with pytest.raises(ValueError, match="sums is no part"):
        proof_page.fill("<!-- begin x2 sums -->\n<!-- end -->", results)
    with pytest.raises(ValueError, match=r"section x4 and the results have x2; .* --section x4"):
        proof_page.fill("<!-- begin x4 how -->\n<!-- end -->", results)


def test_a_claim_is_kept_or_not_by_its_numbers():
    def four_steps(**values):
        student = {
            "psnr_y": 36.0, "top_octave_power_ratio": 0.9, "swd": 10.0,
            "lowres_consistency_psnr": 41.0, "checkerboard_peak": 1.2,
        } | values  # fmt: skip
        models = {
            "student_4": student,
            "teacher_100": {"swd": 10.0, "top_octave_power_ratio": 0.7},
            "teacher_5": {"swd": 14.5},
        }
        found = proof_page.claims({"sets": {"Set14": {"models": models}}})
        return [claim.is_kept for claim in found]

    assert four_steps() == [True] * 7
    for number, wrong in enumerate(
        [{"psnr_y": 30.9}, {"lowres_consistency_psnr": 39.9}, {"top_octave_power_ratio": 1.21},
         {"swd": 10.01}, {"checkerboard_peak": 2.01}]
    ):  # fmt: skip
        places = {0: 1, 1: 2, 2: 3, 3: 4, 4: 6}
        kept = four_steps(**wrong)
        assert [i for i, one in enumerate(kept) if not one] == [places[number]]
    assert four_steps(swd=10.2)[4:6] == [False, False]


@pytest.mark.skipif(not (DOCS / "results.json").exists(), reason="no results are recorded yet")
def test_the_page_of_results_says_what_was_measured():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    results = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    assert proof_page.fill(page, results) == page


def test_a_place_of_another_scale_is_shown_at_the_same_size():
    place = proof_pictures.Place("chelsea", 100, 60, 32, 2)
    shown = proof_pictures.compare(place, {"bicubic": build_baseline("bicubic", scale=4)}, 4)
    assert [picture.size for _, picture in shown] == [(64, 64)] * 2


def test_a_place_is_shown_by_each_model_and_as_it_was():
    place = proof_pictures.Place("chelsea", 100, 60, 32, 2)
    shown = proof_pictures.compare(place, {"bicubic": build_baseline("bicubic", scale=2)})
    assert [label for label, _ in shown] == ["bicubic", "original"]
    assert all(picture.size == (64, 64) for _, picture in shown)
    hires = proof_pictures.as_picture(proof_pictures.original(place))
    pixels = shown[1][1].resize((32, 32), Image.Resampling.NEAREST)
    assert list(pixels.getdata()) == list(hires.getdata())


def test_where_the_study_ended_is_drawn(tmp_path):
    def row(psnr):
        curves = {"val/psnr_y": [(250, 30.0), (500, psnr)], "val/swd": [(250, 20.0), (500, 15.0)]}
        return {"updates": 500, "validation": {"psnr_y": psnr, "swd": 15.0}, "curves": curves}

    drawn = []
    for psnr in (33.0, 33.5):
        rows = {"base": row(33.0), "gamma_1": row(psnr), "ar1": {"failed": "ended"}}
        proof_pictures.write_frontier(rows, tmp_path / "ablations.png")
        drawn.append((tmp_path / "ablations.png").read_bytes())
    assert Image.open(tmp_path / "ablations.png").width > 300
    assert drawn[0] != drawn[1]


def test_curves_of_runs_are_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("update,metric,value\n1,val/psnr_y,30\n2,val/psnr_y,31\n")
    proof_pictures.write_curves({"teacher": tmp_path / "metrics.csv"}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 300


FACTS = {"what": "a student", "section": "x2", "numbers": "student_4", "data": "Noise.",
         "commands": ["make it"], "commit": "abc", "note": "a test."}  # fmt: skip


def test_a_shipped_model_is_half_as_large_and_loads_as_float32(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ship_model, "ASSETS", tmp_path)
    shipped = ship_model.ship(folders / "four", "mini_x2")
    weights = "sr/diffusion_pytorch_model.safetensors"
    assert (shipped / weights).stat().st_size < 0.6 * (folders / "four" / weights).stat().st_size
    assert KSRFlashPipeline.from_pretrained(shipped).sr.dtype == torch.float32
    assert not [p for p in shipped.rglob("*.json") if str(folders) in p.read_text()]
    monkeypatch.setattr(ship_model, "LARGEST_BYTES", 1000)
    with pytest.raises(ValueError, match="the package carries 1000"):
        ship_model.ship(folders / "four", "mini_x4")
    assert not (tmp_path / "mini_x4").exists()


@pytest.mark.slow
def test_a_card_has_the_numbers_of_its_own_model(results):
    card = ship_model.card_of("mini_x2", FACTS, results)
    assert "| photos | student, 4 steps |" in card
    assert "student, 1 step" not in card
    assert "make it" in card


def test_a_card_before_the_measurement_says_so():
    assert "Not measured yet." in ship_model.card_of("mini_x2", FACTS, {})
