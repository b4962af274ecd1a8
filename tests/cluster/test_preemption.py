"""Told to go at any moment, at different moments on different ranks: saved together, continued."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from processes import Processes, wait_until
from two_networks import TwoNetworks, sleeper, train, write_result

from ksr_distill.training.checkpoints import last_good_checkpoint
from ksr_distill.training.preemption import EXIT_PREEMPTED, PreemptionGuard, requeue, slurm_job


def train_guarded(folder: Path, *, seconds: float = 0.0, skew: float = 0.0) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        os.environ.pop(name, None)
    module = TwoNetworks(num_updates=8)
    pause = sleeper(seconds, skew)

    def at(module: TwoNetworks, place: str) -> None:
        (folder / f"at.{module.global_rank}").write_text(str(module.update))
        pause(module, place)

    module.at = at
    guard = PreemptionGuard(stay_alive_s=20)
    told = train(folder / "run", module=module, callbacks=(guard,))
    write_result(folder / f"result.{module.global_rank}.json", digest=told)


def digest_of(folder: Path) -> str:
    return json.loads((folder / "result.0.json").read_text())["digest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("uninterrupted")
    Processes(3, train_guarded, folder).succeed()
    return digest_of(folder)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_skewed_ranks_save_together_and_end_equal(
    tmp_path: Path, uninterrupted: str, number: signal.Signals
) -> None:
    parts = tmp_path / "parts"
    # Longer than the signals are apart: the first one told must not end the others before theirs.
    running = Processes(3, train_guarded, parts, seconds=0.8, skew=0.05)
    wait_until(lambda: (parts / "at.0").exists() and (parts / "at.0").read_text() == "2")
    for process in running.all:  # 0.15 s apart: in Lightning's own handler this deadlocks
        with suppress(ProcessLookupError):  # under load the others are told by the first, and leave
            os.kill(process.pid, number)
        time.sleep(0.15)
    assert running.wait() == [EXIT_PREEMPTED] * 3, running.logs()
    # 2 when the first signal came between the update's end and the ranks' agreement after it
    assert 2 <= int(last_good_checkpoint(parts / "run").stem.removeprefix("update-")) < 8
    assert "the same command continues" in running.logs()
    Processes(3, train_guarded, parts).succeed()
    assert digest_of(parts) == uninterrupted


def test_one_told_rank_is_enough(tmp_path: Path) -> None:
    running = Processes(2, train_guarded, tmp_path, seconds=0.1)
    wait_until((tmp_path / "at.1").exists)
    os.kill(running.all[1].pid, signal.SIGUSR1)
    assert running.wait() == [EXIT_PREEMPTED] * 2, running.logs()


def train_told_before_it_listens(folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))  # as train.py does
    os.kill(os.getpid(), signal.SIGUSR1)
    train_guarded(folder)


def test_a_signal_that_comes_while_loading_is_answered_after_the_first_update(
    tmp_path: Path,
) -> None:
    running = Processes(1, train_told_before_it_listens, tmp_path)
    assert running.wait() == [EXIT_PREEMPTED], running.logs()
    assert last_good_checkpoint(tmp_path / "run").stem == "update-000000001"


class TermBeforeTheFirstUpdate(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def train_told_to_end_before_its_first_update(folder: Path) -> None:
    guard = PreemptionGuard(stay_alive_s=20)
    train(folder / "run", callbacks=(TermBeforeTheFirstUpdate(), guard))


def test_a_run_told_to_end_before_its_first_update_does_not_seem_complete(tmp_path: Path) -> None:
    running = Processes(1, train_told_to_end_before_its_first_update, tmp_path)
    assert running.wait() == [EXIT_PREEMPTED], running.logs()
    assert last_good_checkpoint(tmp_path / "run").stem == "update-000000001"


def train_told_when_it_has_ended(folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    train_guarded(folder)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_that_comes_after_the_end_does_not_fail_the_run(tmp_path: Path) -> None:
    Processes(1, train_told_when_it_has_ended, tmp_path).succeed()


def test_the_guard_gives_the_signals_back(tmp_path: Path) -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train(tmp_path, callbacks=(PreemptionGuard(stay_alive_s=1),))
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, None),
    ],
)
def test_a_job_is_named_as_scontrol_wants_it(environment: dict[str, str], job: str | None) -> None:
    assert slurm_job(environment) == job


def test_without_scontrol_the_user_is_told_to_submit_again(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not requeue("7")
    assert "submit job 7 again" in caplog.text
