"""Faults injected into the real train.py: none hangs, none loses the last good state."""

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes, wait_until
from real_run import digest_of_run, run_train

from ksr_distill.data.loading import HiresBatch
from ksr_distill.training.checkpoint_io import read_checkpoint
from ksr_distill.training.checkpoints import last_good_checkpoint
from ksr_distill.training.datamodule import HiresDataModule
from ksr_distill.training.distillation import DistillationModule
from ksr_distill.types import Batch

FORKED = ("data.num_workers=2", "data.worker_start_method=fork")
EVERY_2 = ("callbacks.checkpoint.every_updates=2",)


def spoil(updates: range) -> None:
    """Make every picture of these updates NaN, on the device, as a broken recipe might."""
    degrade = HiresDataModule.on_after_batch_transfer

    def spoiled(self: HiresDataModule, batch: Any, dataloader_idx: int) -> Batch:
        good = degrade(self, batch, dataloader_idx)
        is_spoiled = isinstance(batch, HiresBatch) and batch.update in updates
        return Batch(good.hires * float("nan"), good.lowres) if is_spoiled else good

    HiresDataModule.on_after_batch_transfer = spoiled


def run_spoiled(folder: Path, *, spoiled: range, **run: Any) -> None:
    spoil(spoiled)
    run_train(folder, **run)


def run_and_lose_a_worker(folder: Path, **run: Any) -> None:
    from ksr_distill.data.reader import ShardDataset  # noqa: PLC0415

    crop = ShardDataset._crop

    def killed(self: ShardDataset, place: Any, position: int) -> Any:
        if position == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return crop(self, place, position)

    ShardDataset._crop = killed
    run_train(folder, **run)


def test_a_batch_of_nan_is_skipped_and_counted(files: Path, tmp_path: Path) -> None:
    run = Processes(2, run_spoiled, tmp_path, files=files, spoiled=range(2, 3))
    run.succeed(120)
    end = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(v.isfinite().all() for v in end["state_dict"].values() if v.is_floating_point())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        told = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert told["health/critic_skipped_updates"] == 1
    assert told["health/student_skipped_updates"] == 1


def test_nan_for_ever_ends_the_run_with_the_last_checkpoint_named(
    files: Path, tmp_path: Path
) -> None:
    changes = (*EVERY_2, "callbacks.non_finite.stop_after=3")
    run = Processes(
        1, run_spoiled, tmp_path, files=files, spoiled=range(2, 99), changes=changes, num_updates=12
    )  # fmt: skip
    assert run.wait(120) == [1]
    told = run.logs()
    assert "gradients were not finite" in told
    assert "checkpoints/update-000000004.ckpt" in told
    end = read_checkpoint(last_good_checkpoint(tmp_path / "run" / "checkpoints"))
    assert all(v.isfinite().all() for v in end["state_dict"].values() if v.is_floating_point())


def test_a_checkpoint_of_another_model_is_refused_with_the_differing_keys(
    files: Path, tmp_path: Path
) -> None:
    die = (2, "turn")
    Processes(1, run_train, tmp_path, files=files, changes=EVERY_2, die=die).wait(120)
    other = Processes(1, run_train, tmp_path, files=files, changes=("critic.head_channels=16",))
    assert other.wait(120) == [1]
    told = other.logs()
    assert "checkpoint is of another model" in told
    assert "critic.heads.heads.0" in told
    assert last_good_checkpoint(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.slow
def test_a_flipped_bit_in_the_newest_checkpoint_costs_the_updates_since_the_one_before(
    files: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Processes(1, run_train, whole, files=files, changes=EVERY_2).succeed(120)
    Processes(1, run_train, parts, files=files, changes=EVERY_2, die=(5, "turn")).wait(120)
    newest = last_good_checkpoint(parts / "run" / "checkpoints")
    data = bytearray(newest.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    newest.write_bytes(bytes(data))
    again = Processes(1, run_train, parts, files=files, changes=EVERY_2)
    again.succeed(120)
    assert "is damaged" in again.logs()
    assert digest_of_run(parts) == digest_of_run(whole)


def run_and_be_killed(folder: Path, **run: Any) -> None:
    """Train with loader workers; note who they are, and be killed."""
    turn = DistillationModule.student_turn

    def killed(self: DistillationModule, *arguments: Any) -> Any:
        workers = [process.pid for process in multiprocessing.active_children()]
        (folder / "workers.json").write_text(json.dumps(workers))
        os.kill(os.getpid(), signal.SIGKILL)
        return turn(self, *arguments)

    DistillationModule.student_turn = killed
    run_train(folder, **run)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "method", ["forkserver", pytest.param("fork", marks=pytest.mark.slow),
               pytest.param("spawn", marks=pytest.mark.slow)],
)  # fmt: skip
def test_no_loader_worker_outlives_a_killed_training(
    files: Path, tmp_path: Path, method: str
) -> None:
    changes = ("data.num_workers=2", f"data.worker_start_method={method}")
    run = Processes(1, run_and_be_killed, tmp_path, files=files, changes=changes)
    assert run.wait(120) == [-signal.SIGKILL]
    workers = json.loads((tmp_path / "workers.json").read_text())
    assert len(workers) == 2
    wait_until(lambda: not any(is_running(pid) for pid in workers), 20)


@pytest.mark.slow
def test_a_killed_loader_worker_ends_the_run_with_a_message(files: Path, tmp_path: Path) -> None:
    run = Processes(
        1, run_and_lose_a_worker, tmp_path, files=files, changes=FORKED
    )  # fmt: skip
    assert run.wait(60) == [1]
    assert "worker" in run.logs()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(
    files: Path, tmp_path: Path
) -> None:
    small = tmp_path / "run"
    small.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(small)], check=True
    )  # fmt: skip
    try:
        run = Processes(
            1, run_train, tmp_path, files=files,
            changes=("callbacks.checkpoint.every_updates=1", "callbacks.checkpoint.keep_last=50"),
        )  # fmt: skip
        assert run.wait(120) == [1]
        told = run.logs()
        assert "No space left" in told
        assert "training goes on" in told
        assert "the last good checkpoint" in told
        good = last_good_checkpoint(small / "checkpoints")
        assert torch.is_tensor(next(iter(read_checkpoint(good)["state_dict"].values())))
        assert not list(small.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
