"""What goes wrong ends with a message, and nothing hangs."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from processes import Processes, wait_until
from two_networks import TwoNetworks, train

from ksr_distill.training.guards import CollapseMonitor, NonFiniteGuard, is_range
from ksr_distill.training.wandb_logger import GuestWandbLogger
from ksr_distill.training.watchdog import EXIT_STALLED, StallWatchdog


def test_a_run_of_skipped_updates_stops_with_the_last_checkpoint_named(tmp_path: Path) -> None:
    module = TwoNetworks(num_updates=9)

    def skip(module: TwoNetworks, place: str) -> None:
        if place == "end of the update" and module.update > 4:
            module.skipped_in_a_row[1] += 1

    module.at = skip
    guard = NonFiniteGuard(stop_after=2, every_updates=1)
    with pytest.raises(ValueError, match=r"critic: its last 2 gradients .*update-000000004\.ckpt"):
        train(tmp_path, module=module, callbacks=(guard,), checkpoint={"every_updates": 2})
    assert module.update == 6


def test_one_skipped_update_stops_nothing(tmp_path: Path) -> None:
    module = TwoNetworks(num_updates=3)
    module.skipped_in_a_row[0] = 1
    train(tmp_path, module=module, callbacks=(NonFiniteGuard(stop_after=2, every_updates=1),))


def monitor(stop_after: int | None) -> CollapseMonitor:
    return CollapseMonitor(
        ranges={"health/auc_head_*": (0.5, 0.98)},
        advice={"health/auc_head_*": "lower the critic's rate"},
        every_updates=1,
        warn_after=2,
        stop_after=stop_after,
    )


def log_auc(value: float) -> Any:
    def at(module: TwoNetworks, place: str) -> None:
        module.logged["health/auc_head_2"] = value
        module.logged["other"] = 7.0

    return at


def test_a_collapse_is_warned_of_once_with_the_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = TwoNetworks(num_updates=5)
    module.at = log_auc(0.993)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, module=module, callbacks=(monitor(None),))
    told = [record.getMessage() for record in caplog.records if "auc" in record.getMessage()]
    assert len(told) == 1
    assert "health/auc_head_2=0.993 has been outside [0.5, 0.98] for 2 looks" in told[0]
    assert "lower the critic's rate" in told[0]


def test_a_range_without_advice_is_watched_and_what_is_no_range_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def watching(ends: Any) -> CollapseMonitor:
        return CollapseMonitor(
            ranges={"health/mean_drift": ends}, advice={}, every_updates=1, warn_after=1,
            stop_after=None,
        )  # fmt: skip

    monitor = watching([0.0, 0.1])
    assert monitor.look("health/mean_drift", 0.05) == ""
    monitor.look("health/mean_drift", 0.5)
    assert "outside [0, 0.1] for 1 looks in a row: look at previews/" in caplog.text
    assert not any(is_range(ends) for ends in ("01", 0.5, ["a", "b"], [True, 2], None))
    for ends in ([0.0], [1.0, 0.0], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match=r"callbacks\.collapse\.ranges\.health/mean_drift="):
            watching(ends)


def test_a_collapse_can_stop_the_run(tmp_path: Path) -> None:
    module = TwoNetworks(num_updates=5)
    module.at = log_auc(float("nan"))
    with pytest.raises(ValueError, match=r"auc_head_2=nan .*stop_after=3"):
        train(tmp_path, module=module, callbacks=(monitor(3),))
    assert module.update == 3


def test_a_healthy_game_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = TwoNetworks(num_updates=5)
    module.at = log_auc(0.8)
    train(tmp_path, module=module, callbacks=(monitor(1),))
    assert "auc" not in caplog.text


class StuckLoader(TwoNetworks):
    def train_dataloader(self) -> Any:
        positions, module = super().train_dataloader(), self

        class Stuck(type(positions)):
            def __iter__(self) -> Any:
                for position in super().__iter__():
                    if position == 3 and module.global_rank == 1:
                        time.sleep(100)
                    yield position

        return Stuck(self, self.num_updates)


def train_with_a_stuck_loader(folder: Path) -> None:
    watchdog = StallWatchdog(folder / "ranks", timeout_s=2)
    train(folder / "run", module=StuckLoader(), callbacks=(watchdog,), timeout_s=60)


def fail_and_hang_at_the_end(folder: Path) -> None:
    module = TwoNetworks()

    def fail(module: TwoNetworks, place: str) -> None:
        if module.update == 2:
            raise ValueError("a guard has had enough")

    module.at = fail
    watchdog = StallWatchdog(folder / "ranks", timeout_s=2)
    try:
        train(folder / "run", module=module, callbacks=(watchdog,), timeout_s=60)
    except ValueError:
        time.sleep(100)  # as NCCL may, that waits for a lost rank


def test_a_process_that_hangs_at_the_end_of_a_failed_run_is_ended(tmp_path: Path) -> None:
    running = Processes(2, fail_and_hang_at_the_end, tmp_path)
    assert running.wait(timeout=30) == [EXIT_STALLED] * 2
    assert "is ending after an error" in running.logs()


def test_a_stalled_loader_ends_every_rank_and_is_named(tmp_path: Path) -> None:
    running = Processes(2, train_with_a_stuck_loader, tmp_path)
    assert EXIT_STALLED in running.wait(timeout=30)
    told = running.logs()
    assert "rank 1 waits for its loader" in told
    assert "(0 gone, 1 behind, of 2)" in told
    assert "The same command continues" in told


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_who_has_ended_an_update_is_not_behind_one_who_is_still_inside(
    tmp_path: Path, lost: int
) -> None:
    module, trainer = TwoNetworks(), pl.Trainer(logger=False, accelerator="cpu")
    ranks = [StallWatchdog(tmp_path, timeout_s=60) for _ in range(3)]
    for rank, watchdog in enumerate(ranks):
        watchdog._rank, watchdog._world = rank, 3
        watchdog.on_train_batch_start(trainer, module, None, 4)
        if rank != lost:
            watchdog.on_train_batch_end(trainer, module, None, None, 4)
        watchdog._beat()
    for watchdog in ranks:
        told = watchdog.state_of_ranks()
        assert told.startswith(f"rank {lost} is inside an update")
        assert told.endswith("at update 4 (0 gone, 1 behind, of 3)")


def train_slowly(folder: Path) -> None:
    module = TwoNetworks(num_updates=500)
    module.at = lambda module, _: (
        (folder / f"at.{module.global_rank}").write_text(str(module.update)),
        time.sleep(0.02),
    )
    watchdog = StallWatchdog(folder / "ranks", timeout_s=3)
    train(folder / "run", module=module, callbacks=(watchdog,), timeout_s=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_and_is_named(tmp_path: Path, number: signal.Signals) -> None:
    running = Processes(3, train_slowly, tmp_path)
    wait_until((tmp_path / "ranks" / "rank-2.json").exists)
    wait_until((tmp_path / "at.0").exists)
    os.kill(running.all[2].pid, number)
    for process in running.all[:2]:
        process.join(40)
        assert process.exitcode not in (0, None), running.logs()
    running.kill()
    told = running.logs()
    if number == signal.SIGKILL and "remote worker" in told:
        return  # the collective's own error came first, which ends the run as well
    assert ("rank 2 is gone" if number == signal.SIGKILL else "rank 2 ") in told


def test_wandb_without_a_key_is_offline_and_asks_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    begun: list[str] = []
    logger = guest(tmp_path)
    monkeypatch.setattr(logger, "_init", lambda mode, _: begun.append(mode) or FakeRun())
    logger.log_metrics({"a": 1.0}, step=1)
    assert begun == ["offline"]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log(self, row: Any) -> None:
        self.logged.append(row)
        if len(self.logged) > 1:
            raise ConnectionError("the network is gone")


def guest(folder: Path) -> GuestWandbLogger:
    return GuestWandbLogger(
        folder=folder, project="p", name="n", group=None, artifact=None, init_timeout_s=1
    )


def test_a_wandb_outage_costs_one_warning(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logger, run = guest(tmp_path), FakeRun()
    monkeypatch.setattr(logger, "_start", lambda: run)
    for update in range(5):
        logger.log_metrics({"a": 1.0}, step=update)
    logger.finalize("success")
    assert run.logged == [{"a": 1.0, "update": 0}, {"a": 1.0, "update": 1}]
    assert len(caplog.records) == 1
    assert "ConnectionError: the network is gone" in caplog.text
    assert "metrics.csv" in caplog.text


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    assert guest(tmp_path).version == guest(tmp_path).version


@pytest.mark.slow
def test_a_real_wandb_that_cannot_be_reached_goes_offline(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = guest(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    assert "cannot be reached" in caplog.text
    assert any((tmp_path / "wandb").glob("offline-run-*"))
