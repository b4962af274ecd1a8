"""A run says how fast it is and what it was, and tells no secret."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from two_networks import TwoNetworks, train

from ksr_distill.training.history import MetricsCSV
from ksr_distill.training.run_record import RunRecord, scrub, scrub_command
from ksr_distill.training.throughput import Throughput

CONFIG = {
    "name": "x",
    "data": {"shards": "https://me:hunter2@host/a.tar"},
    "logger": {"wandb": {"api_key": "abc", "project": "p"}},
}


def figures(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "metrics.csv").open() as file:
        return {(int(r["update"]), r["metric"]): float(r["value"]) for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    module = TwoNetworks(num_updates=9)
    module.record = {"config": CONFIG}
    callbacks = (RunRecord(folder), Throughput(every_updates=4, count_flops=True))
    loggers = [MetricsCSV(folder=str(folder))]
    train(folder, module=module, callbacks=callbacks, trainer={"logger": loggers})
    return folder


def test_speed_memory_and_waiting_are_logged_per_rank_every_n_updates(run: Path) -> None:
    told = figures(run)
    assert {update for update, name in told if name.startswith("speed/")} == {4, 8}
    assert told[4, "speed/updates_per_s"] > 0
    assert 0 <= told[8, "rank/0/loader_wait_share"] < 1
    assert told[8, "rank/0/memory_gb"] > 0.05


def test_the_arithmetic_of_an_update_is_that_of_its_matrix_products(tmp_path: Path) -> None:
    speed = Throughput(every_updates=100, count_flops=True)
    train(tmp_path, module=TwoNetworks(num_updates=1, global_batch=12), callbacks=(speed,))

    def forward(outputs: int, rows: int) -> int:
        return 2 * rows * (8 * 64 + 64 * 64 + 64 * outputs)

    def weights_gradient(outputs: int, rows: int) -> int:
        return forward(outputs, rows)

    def inputs_gradient(outputs: int, rows: int, *, of_first_layer: bool) -> int:
        first = 2 * rows * 8 * 64
        return forward(outputs, rows) - (0 if of_first_layer else first)

    critic = forward(8, 12) + forward(1, 24) + weights_gradient(1, 24)
    critic += inputs_gradient(1, 24, of_first_layer=False)
    student = forward(8, 12) + weights_gradient(8, 12)
    student += inputs_gradient(8, 12, of_first_layer=False)
    student += forward(1, 12) + inputs_gradient(1, 12, of_first_layer=True)
    assert speed.flops_per_update == critic + student


def test_the_folder_says_what_was_run(run: Path) -> None:
    [start] = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert start["from_update"] == 0
    assert start["num_processes"] == 1
    assert start["versions"]["torch"]
    assert start["machine"]["num_cpus"] >= 1
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "x"


def test_secrets_are_not_written_down(run: Path) -> None:
    written = (run / "config.yaml").read_text() + (run / "starts.jsonl").read_text()
    assert "hunter2" not in written
    assert (
        "abc" not in yaml.safe_load((run / "config.yaml").read_text())["logger"]["wandb"].values()
    )
    assert scrub({"max_keys": 3, "token": "t", "n": None}) == {
        "max_keys": 3,
        "token": "***",
        "n": None,
    }
    command = ["train.py", "logger.wandb.api_key=abc", "name=x", "data.shards=s3://u:p@h/x"]
    assert scrub_command(command) == [
        "train.py", "logger.wandb.api_key=***", "name=x", "data.shards=s3://***@h/x",
    ]  # fmt: skip


def test_a_saves_share_of_the_time_is_told(tmp_path: Path) -> None:
    module: Any = TwoNetworks(num_updates=4)
    speed = Throughput(every_updates=4, count_flops=False)
    loggers = [MetricsCSV(folder=str(tmp_path))]
    train(
        tmp_path, module=module, callbacks=(speed,), trainer={"logger": loggers},
        checkpoint={"every_updates": 1},
    )  # fmt: skip
    assert 0 < figures(tmp_path)[4, "speed/checkpoint_share"] < 1


def test_torn_rows_of_a_crash_cost_themselves_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(b"update,metric,value\n2,a,1\n3,b,2\nx,b,c\n\0\0\0,b,c\n\xff\xfe,b,c\n4,a")
    MetricsCSV(folder=str(tmp_path)).log_metrics({"c": 5.0}, step=3)
    assert figures(tmp_path) == {(2, "a"): 1, (3, "b"): 2, (3, "c"): 5}


def test_a_full_disk_at_the_start_costs_the_record_and_not_the_run(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text("name: before\n")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ksr_distill.durable.flush_to_disk", full)
    module = TwoNetworks(num_updates=1)
    module.record = {"config": CONFIG}
    train(tmp_path / "checkpoints", module=module, callbacks=(RunRecord(tmp_path),))
    assert "lack this start ([Errno 28] No space" in caplog.text
    assert (tmp_path / "config.yaml").read_text() == "name: before\n"
