import json

import pytest
import torch

from benchmarks import inference


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu_and_writes_what_is_asked_of_it(tmp_path, monkeypatch, capsys):
    target = tmp_path / "inference.json"
    monkeypatch.setattr(
        "sys.argv", ["inference", "--tiny", "--repeats", "1", "--json", str(target)]
    )
    monkeypatch.setattr(inference, "first_call_elsewhere", lambda _: 1.0)  # a process of its own
    inference.main()
    results = json.loads(target.read_text())
    asked = {"seconds", "sr_seconds", "peak_gb", "psnr_db", "baseline_seconds", "in_turns",
             "batch_seconds_per_picture", "first_call_seconds", "matmul_tflops", "date",
             "versions"}  # fmt: skip
    assert asked <= set(results)
    assert results["psnr_db"] > 100  # float32 on a CPU: the fast networks are the networks
    assert set(results["ours"]) == {"whole", "sr", "encode", "refine", "decode"}
    assert "| ours | sr |" in capsys.readouterr().out


def test_random_weights_give_pictures_of_a_picture_contrast():
    bench = inference.Bench(torch.device("cpu"), tiny=True)
    picture = bench.whole()
    assert 0.05 < float(picture.std()) < 0.35
    assert float(((picture <= 0) | (picture >= 1)).float().mean()) < 0.1


def test_psnr_is_that_of_pictures_from_0_to_1():
    picture = torch.full((3, 4, 4), 0.5)
    assert inference.psnr(picture + 0.1, picture) == pytest.approx(20, abs=1e-4)


def test_stages_keep_no_gradients():
    bench = inference.Bench(torch.device("cpu"), tiny=True)
    for name, call in bench.stages.items():
        assert not call().requires_grad, name  # at full size they do not fit into 140 GB
