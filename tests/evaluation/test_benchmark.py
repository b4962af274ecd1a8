import csv
import json

import numpy as np
import pytest
import torch

from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.benchmark import BenchmarkSettings, run_benchmark, values_of
from ksr_distill.evaluation.benchmark_images import find_images, read_image
from ksr_distill.evaluation.feature_network import FeatureNetwork
from ksr_distill.evaluation.lpips import LPIPS
from ksr_distill.evaluation.metrics import psnr_y
from ksr_distill.evaluation.results import (
    paired_differences,
    summarise,
    write_metrics_json,
    write_per_image_csv,
)
from ksr_distill.evaluation.upscalers import (
    ModelSpec,
    Upscaled,
    build_baseline,
    build_upscalers,
)
from tests.evaluation.conftest import photo, write_pair

CPU = torch.device("cpu")


def settings(**options):
    return BenchmarkSettings(
        **{"scale": 2, "border_px": 2, "seed": 0, "crop_px": 16, "device": CPU, **options}
    )


def run(upscalers, images, folder, **options):
    done = []
    benchmark = run_benchmark(
        upscalers,
        images,
        settings(**options),
        folder=folder,
        on_output=lambda *what: done.append(what),
    )
    return benchmark, done


def baselines(*names):
    return {name: build_baseline(name, scale=2) for name in names}


@pytest.fixture(scope="module")
def small_benchmark(tmp_path_factory, student_folder):
    folder = tmp_path_factory.mktemp("benchmark")
    for seed, name in enumerate(("bird", "house", "sea")):
        write_pair(folder / "pairs", name, photo(seed=seed))
    upscalers = baselines("nearest", "bicubic") | build_upscalers(
        [ModelSpec("student", student_folder)], scale=2, device=CPU, half=False
    )
    return run(upscalers, find_images(folder / "pairs"), folder)


def test_every_output_is_saved_measured_and_reported(small_benchmark):
    benchmark, done = small_benchmark
    assert len(done) == len(benchmark.rows) == 9
    assert done[0] == ("bird", "nearest")
    # What is measured is what was saved, rounding and all.
    saved = read_image(benchmark.picture("house", "student"))
    original = read_image(benchmark.picture("house", "original"))
    expected = psnr_y(saved, original, border_px=2).item()
    assert values_of(benchmark, "student", "psnr_y")["house"] == pytest.approx(expected, abs=1e-5)


def test_estimates_are_saved_by_step(small_benchmark):
    benchmark, _ = small_benchmark
    (row,) = (r for r in benchmark.rows if (r.image, r.model) == ("sea", "student"))
    assert list(row.estimates) == [1, 2, 3, 4]
    last = read_image(row.estimates[4])
    assert torch.equal(last, read_image(benchmark.picture("sea", "student")))


def test_small_images_have_no_ms_ssim_rather_than_a_wrong_one(small_benchmark):
    benchmark, _ = small_benchmark
    assert all(row.values["ms_ssim_y"] is None for row in benchmark.rows)
    assert "ms_ssim_y" not in summarise(benchmark)["bicubic"]


def test_differences_are_paired_by_image(small_benchmark):
    benchmark, _ = small_benchmark
    ours, theirs = (values_of(benchmark, m, "psnr_y") for m in ("nearest", "bicubic"))
    interval = paired_differences(benchmark, "bicubic")["nearest"]["psnr_y"]
    differences = np.array([ours[name] - theirs[name] for name in ours])
    assert interval.mean == pytest.approx(differences.mean())
    assert differences.min() <= interval.low <= interval.high <= differences.max()
    with pytest.raises(ValueError, match="compare_with=lanczos is not among the models"):
        paired_differences(benchmark, "lanczos")


def test_metrics_json_and_the_csv_agree(small_benchmark, tmp_path):
    benchmark, _ = small_benchmark
    write_metrics_json(benchmark, tmp_path / "m.json", compare_with="bicubic", settings={"a": 1})
    write_per_image_csv(benchmark, tmp_path / "p.csv")
    document = json.loads((tmp_path / "m.json").read_text())
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = [float(row["swd"]) for row in rows if row["model"] == "student"]
    assert document["models"]["student"]["swd"] == pytest.approx(np.mean(column), rel=1e-5)
    low, high = document["intervals"]["student"]["swd"]
    assert low <= document["models"]["student"]["swd"] <= high
    assert document["models"]["student"]["num_inference_steps"] == 4
    assert document["models"]["student"]["kid"].startswith("skipped: give feature_weights=")
    assert document["models"]["student"]["lpips"].startswith("skipped: give lpips_weights=")
    worst = document["worst"]["student"]["psnr_y"]
    assert worst["value"] == min(values_of(benchmark, "student", "psnr_y").values())
    assert set(document["paired_differences"]) == {"nearest", "student"}


def test_the_same_seed_gives_the_same_numbers(pairs, tmp_path, student_folder):
    images = find_images(pairs)[:1]
    specs = [ModelSpec("student", student_folder)]
    runs = [
        run(build_upscalers(specs, scale=2, device=CPU, half=False), images, tmp_path, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    psnrs = [values_of(benchmark, "student", "psnr_y")["bird"] for benchmark in runs]
    assert psnrs[0] == psnrs[1] != psnrs[2]


def test_with_weights_there_are_lpips_and_kid(pairs, tmp_path):
    torch.manual_seed(0)
    network = FeatureNetwork("alex")
    benchmark, _ = run(
        baselines("nearest", "bicubic"),
        find_images(pairs),
        tmp_path,
        lpips=LPIPS(network),
        feature_network=network,
        crop_px=32,
    )
    assert values_of(benchmark, "bicubic", "lpips")["sea"] > 0
    assert "lpips" not in benchmark.of_sets["bicubic"]
    assert benchmark.of_sets["bicubic"]["kid"].startswith("skipped: 12 crops are too few")


def test_where_only_the_lowres_is_known_its_own_degradation_judges(tmp_path, pairs):
    for path in pairs.glob("*_HR.png"):
        path.unlink()
    images = find_images(None, pairs)
    benchmark, _ = run(
        baselines("nearest", "bicubic"),
        images,
        tmp_path / "out",
        degradation=BicubicDegradation(scale=2),
    )
    row = benchmark.rows[0]
    assert "psnr_y" not in row.values
    assert row.values["lowres_consistency_psnr"] > 30
    assert not benchmark.picture(row.image, "original").exists()


def test_a_model_of_another_scale_is_named(pairs, tmp_path):
    class Wrong:
        num_inference_steps = 1

        def __call__(self, lowres, *, generator):
            return Upscaled(lowres)

    with pytest.raises(ValueError, match="wrong gave 32x40 px instead of 64x80"):
        run({"wrong": Wrong()}, find_images(pairs), tmp_path)
