"""The speed benchmarks run, and count what they claim to count."""

import json

import pytest
import torch

from benchmarks import loader, startup, training
from benchmarks.modules import build_module, composed, random_batch, write_random_teacher
from benchmarks.profiling import kind_of
from ksr_distill.models import KSRUNet
from ksr_distill.training.arithmetic import ArithmeticCounter


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "training.json"
    arguments = ["--tiny", "--only", "1", "--calls", "1", "--quick", "--device", "cpu"]
    training.main([*arguments, "--json", str(path)])
    return json.loads(path.read_text())


def test_training_benchmark_names_its_figures_and_its_machine(results):
    assert results["share_of_matmul"] > 0
    assert results["speedup_over_eager"] > 0
    assert {row["what"] for row in results["rows"]} == {"student turn", "critic turn", "update"}
    assert {"eager", "ours"} < {row["mode"] for row in results["rows"]}
    assert results["date"]
    assert results["versions"]["torch"]


def test_rows_of_another_call_stay_and_those_measured_again_do_not(results):
    rows = [training.Row(**row) for row in results["rows"]]
    again = [rows[-1]._replace(seconds=1.0)]
    other = [rows[-1]._replace(crop_px=1)]
    assert training.joined(rows, again) == rows[:-1] + again
    assert training.joined(rows, other) == rows + other


def test_shares_are_of_the_fastest_product_of_the_run(results):
    rows = [training.Row(**row) for row in results["rows"]][:2]
    disturbed = [rows[0]._replace(matmul_tflops=300.0, tflops=400.0),
                 rows[1]._replace(matmul_tflops=800.0, tflops=200.0)]  # fmt: skip
    told = training.against_one_rate(disturbed)
    assert [row.share_of_matmul for row in told] == [0.5, 0.25]
    assert {row.matmul_tflops for row in told} == {800.0}


def test_worst_case_is_what_is_told(results):
    rows = [training.Row(**row) for row in results["rows"]]
    worse = [row._replace(crop_px=1, share_of_matmul=0.5 * row.share_of_matmul) for row in rows]
    assert training.as_results(rows + worse)["share_of_matmul"] == pytest.approx(
        0.5 * results["share_of_matmul"]
    )


def test_counted_operations_of_a_student_are_those_of_its_convolutions():
    unet = KSRUNet(base_channels=4, channel_multipliers=(1,), num_blocks=(1,),
                   time_embedding_dim=8, num_groups=2)  # fmt: skip
    with ArithmeticCounter() as counter:
        unet(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 3, 4, 4))
    # 2 · 9 taps · in · out · pixels: first, two in each of two blocks, last; and the time's layers.
    blocks = 4 * 4 + 4 * 4  # down
    blocks += 4 * 4 + 4 * 4  # up
    convolutions = 2 * 9 * 64 * (6 * 4 + blocks + 4 * 3)
    linear = 2 * (4 * 8 + 8 * 8 + 2 * 8 * 8)
    assert counter.get_total_flops() == convolutions + linear


def test_an_update_is_made_of_its_turns(tmp_path):
    config = composed(*training.CASES["tiny"][1].overrides, f"teacher={tmp_path}",
                      "loss.game.backward_simulation_prob=0.0")  # fmt: skip
    write_random_teacher(tmp_path, config["model"])
    device = torch.device("cpu")
    module, batch = build_module(config, device), random_batch(1, 32, device)
    flops = {}
    for name, turn in training.turns_of(module).items():
        with ArithmeticCounter() as counter:
            turn(module, batch)
        flops[name] = counter.get_total_flops()
    with ArithmeticCounter() as counter, torch.no_grad():
        module.forward_pass(module.prepare(batch)[0], with_gradient=False)
    # The update shares the student's and the trunk's forward passes between the turns.
    assert (
        flops["update"] == flops["student turn"] + flops["critic turn"] - counter.get_total_flops()
    )


def test_kernels_are_sorted_by_what_they_do():
    assert kind_of("triton_red_fused_native_group_norm_3") == "compiled"
    assert kind_of("sm90_xmma_fprop_implicit_gemm_bf16f32") == "convolution"
    assert kind_of("nvjet_hsh_128x256_64x4_TNT") == "matrix product"
    assert kind_of("multi_tensor_apply_kernel<FusedAdam>") == "optimiser"
    assert kind_of("ncclDevKernel_AllReduce_Sum_f32") == "collective"


def test_loader_benchmark_measures_both_sides(tmp_path):
    case = loader.Case("few", "png", 32, 16, 20)
    (tmp_path / "photos").mkdir()
    loader.make_pictures(tmp_path / "photos", case)
    shards = loader.pack(tmp_path / "photos", tmp_path / "shards", None)
    row = loader.measure(case, shards, positions=16, workers=1, repeats=1)
    assert row.bare_cpu_ms > 0
    assert row.crop_cpu_ms > 0
    assert row.loader_crops_per_s > 0


def test_startup_benchmark_starts_what_it_names(tmp_path):
    startup.main(["--starts", "1", "--json", str(tmp_path / "startup.json")])
    results = json.loads((tmp_path / "startup.json").read_text())
    assert 0 < results["ksr_help_cpu_seconds"] < 5
