import html.parser
import re

import pytest
import torch

from ksr_distill.evaluation.benchmark import BenchmarkSettings, run_benchmark
from ksr_distill.evaluation.benchmark_images import as_picture, find_images
from ksr_distill.evaluation.catalogue import BY_KEY
from ksr_distill.evaluation.curves import read_curves
from ksr_distill.evaluation.figures import (
    quality_against_speed,
    quality_against_steps,
    step_series,
    training_curves,
)
from ksr_distill.evaluation.report import ReportSettings, write_report
from ksr_distill.evaluation.report_pictures import choose_view
from ksr_distill.evaluation.results import summarise
from ksr_distill.evaluation.upscalers import ModelSpec, build_baseline, build_upscalers
from tests.evaluation.conftest import photo, write_pair

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, student_folder):
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("bird", "<b>bold</b>")):
        write_pair(folder / "pairs", name.replace("/", "_"), photo(seed=seed))
    specs = [
        ModelSpec("student_1", student_folder, num_inference_steps=1),
        ModelSpec("student_4", student_folder),
        ModelSpec("<script>alert(1)<script>", student_folder),
    ]
    upscalers = {"bicubic": build_baseline("bicubic", scale=2)}
    return run_benchmark(
        upscalers | build_upscalers(specs, scale=2, device=CPU, half=False),
        find_images(folder / "pairs"),
        BenchmarkSettings(scale=2, border_px=2, seed=0, crop_px=32, device=CPU),
        folder=folder,
        on_output=lambda *_: None,
    )


def write(benchmark, path, **options):
    defaults = {"title": "A & B", "compare_with": "bicubic", "judged": "student_4",
                "sort_by": "psnr_y", "max_cards": 12, "curves": None}  # fmt: skip
    settings = ReportSettings(**{**defaults, **options})
    write_report(benchmark, path, settings=settings, facts={"Seed": "0"})
    return path.read_text()


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def find(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


@pytest.fixture(scope="module")
def text(benchmark, tmp_path_factory):
    return write(benchmark, tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_needs_nothing_but_itself(text):
    page = Page(text)
    sources = [a.get("src", "") + a.get("href", "") for _, a in page.elements]
    outside = [s for s in sources if s and not s.startswith(("data:", "#"))]
    assert outside == []
    assert not page.find("link")
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_names_are_text_and_never_markup(text):
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in text


def test_a_card_has_every_model_the_steps_and_an_error_map(text):
    page = Page(text)
    assert len(page.find("article")) == 2
    assert len(page.find("img", **{"data-name": "student_4"})) == 2
    assert len(page.find("img", **{"data-error": "student_4"})) == 2
    assert len(page.find("img", **{"data-error": "original"})) == 0
    assert text.count("after step 4") == 4  # two students of four steps, two images
    assert len(page.find("input", type="range")) == 2


def test_the_worst_image_comes_first(benchmark, tmp_path):
    values = {row.image: row.values["swd"] for row in benchmark.rows if row.model == "student_4"}
    page = Page(write(benchmark, tmp_path / "r.html", sort_by="swd", max_cards=1))
    (image, *_) = page.find("img", **{"data-name": "original"})
    assert image["alt"] == f"{max(values, key=values.get)}, original"


def test_worse_is_what_the_metric_says():
    assert BY_KEY["psnr_y"].badness(29.0) > BY_KEY["psnr_y"].badness(30.0)
    assert BY_KEY["swd"].badness(30.0) > BY_KEY["swd"].badness(29.0)
    octave = BY_KEY["top_octave_power_ratio"]
    assert octave.badness(1.2) > octave.badness(0.9)


def test_the_best_of_each_column_is_marked(benchmark, text):
    best = max(m.mean for m in (s["psnr_y"] for s in summarise(benchmark).values()))
    assert f'<td class="best">{best:.2f}<small>' in text


def test_models_that_differ_by_a_number_are_a_series(benchmark):
    assert step_series(benchmark) == {"student": ["student_1", "student_4"]}
    assert len(quality_against_steps(benchmark, summarise(benchmark))) == 4
    speed = quality_against_speed(summarise(benchmark))
    assert all(plot.startswith("<svg") and "student_4" in plot for plot in speed)


def test_the_worst_place_is_where_the_error_is(tmp_path):
    original = torch.zeros(1, 3, 400, 300)
    output = original.clone()
    output[..., 250:330, 40:120] = 0.5
    for name, image in (("a", original), ("b", output)):
        as_picture(image).save(tmp_path / f"{name}.png")
    view = choose_view(tmp_path / "b.png", tmp_path / "a.png")
    assert view.crop.left <= 40
    assert view.crop.left + view.crop.width >= 120
    assert view.crop.top <= 250
    assert view.crop.top + view.crop.height >= 330
    assert (view.stage.width, view.stage.height) == (300, 400)


def test_large_pictures_are_cut_around_the_worst_place_never_resampled(tmp_path):
    original = torch.zeros(1, 3, 64, 1500)
    output = original.clone()
    output[..., 1400:] = 0.5
    for name, image in (("a", original), ("b", output)):
        as_picture(image).save(tmp_path / f"{name}.png")
    view = choose_view(tmp_path / "b.png", tmp_path / "a.png")
    assert (view.stage.left, view.stage.width, view.stage.height) == (476, 1024, 64)
    assert view.crop.left + view.crop.width <= 1500


def test_curves_are_drawn_validation_first(benchmark, tmp_path):
    rows = ["update,metric,value"]
    rows += [f"{u},{m},{u / 7}" for u in range(900) for m in ("train/loss", "val/psnr_y")]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    curves = training_curves(tmp_path / "metrics.csv")
    assert [name for name, _ in curves] == ["val/psnr_y", "train/loss"]
    assert len(curves[0][1]) < 30_000
    text = write(benchmark, tmp_path / "r.html", curves=tmp_path / "metrics.csv")
    assert '<figure aria-label="val/psnr_y">' in text


def test_curves_that_are_none_are_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match="is no file; give a run's"):
        read_curves(path)
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \['step', 'loss'\]"):
        read_curves(path)
    path.write_text("update,metric,value\n1,loss,2\n2,loss,broken\n")
    with pytest.raises(ValueError, match="line 3: could not convert"):
        read_curves(path)


def test_an_unknown_metric_to_sort_by_is_refused():
    with pytest.raises(ValueError, match="sort_by='psnr' is no metric; use psnr_y, ssim_y"):
        ReportSettings("", "a", "b", "psnr", 1, None)
