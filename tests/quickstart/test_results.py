import csv
import json
import re

import pytest
from PIL import Image

from ksr_distill.quickstart.ledger import Ledger
from ksr_distill.quickstart.processes import Usage
from ksr_distill.quickstart.results import (
    add_commands,
    add_enlarged_photo,
    add_usage,
    merge_curves,
)

NUMBERS = {"psnr_y": 33.0, "top_octave_power_ratio": 0.4, "ssim_y": 0.9}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "progress.json")
    ledger.add(["a"], Usage(100.04, 1.25), is_done=True)
    ledger.add(["b"], Usage(20.0, 2.5), is_done=True)
    return ledger


def test_metrics_json_keeps_the_quickstarts_promise(tmp_path, ledger):
    file = tmp_path / "metrics.json"
    models = dict.fromkeys(("nearest", "bicubic", "teacher_1", "student_4"), NUMBERS)
    file.write_text(json.dumps({"num_images": 3, "models": models}))
    for _ in range(2):  # a second start must not spoil it
        add_usage(file, ledger)
        written = json.loads(file.read_text())
        assert written["seconds"] == 120.0
        assert written["peak_rss_gb"] == 2.5
        assert written["num_images"] == 3
        for name in ("bicubic", "teacher", "student_4"):
            assert written[name] == {"psnr_y": 33.0, "top_octave_power_ratio": 0.4}


def test_a_model_that_was_not_measured_is_named(tmp_path, ledger):
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"models": {"bicubic": NUMBERS, "student_4": NUMBERS}}))
    with pytest.raises(ValueError, match="has no teacher_1"):
        add_usage(file, ledger)


def test_curves_of_two_runs_stay_apart(tmp_path):
    for run in ("teacher", "student"):
        (tmp_path / f"{run}.csv").write_text("update,metric,value\n10,val/psnr_y,33.5\n")
    out = tmp_path / "curves.csv"
    merge_curves({run: tmp_path / f"{run}.csv" for run in ("teacher", "student")}, out)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == ["teacher: val/psnr_y", "student: val/psnr_y"]
    assert {row["update"] for row in rows} == {"10"}


def test_the_enlarged_photo_is_shown_once_and_from_the_same_place(tmp_path):
    photo = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    photo.save(tmp_path / "photo.png")
    enlarged = {}
    for scale in (2, 4):
        enlarged[scale] = tmp_path / f"x{scale}.png"
        photo.resize((300 * scale, 200 * scale), Image.Resampling.BICUBIC).save(enlarged[scale])
    report = tmp_path / "report.html"
    report.write_text("<html><body><footer>f</footer></body></html>")
    for _ in range(2):
        add_enlarged_photo(report, tmp_path / "photo.png", enlarged, usage="120 s & 2 GB")
    page = report.read_text()
    assert page.count('<section id="enlarged">') == 1
    assert page.index("enlarged") < page.index("<footer>")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "bicubic ×2",
        "student, four steps ×2",
        "bicubic ×4",
        "student, four steps ×4",
    ]
    assert "120 s &amp; 2 GB" in page
    assert "http" not in page


def test_the_report_says_once_what_was_typed_and_whose_student_it_is(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("<html><body><footer>f</footer></body></html>")
    ledger = Ledger(tmp_path / "progress.json")
    ledger.add(("ksr", "export", "a<b"), Usage(61.2, 1.0), is_done=True)
    for _ in range(2):
        add_commands(report, ledger, teacher="from the package")
    page = report.read_text()
    assert page.count("<code>ksr export a&lt;b</code></td><td>61 s</td>") == 1
    assert page.count("from the package") == 1
