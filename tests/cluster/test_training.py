"""The real train.py: killed anywhere, continued by the same command, equal bit for bit."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Processes, wait_until
from real_run import NUM_PHOTOS, consumed, digest_of_run, run_train

from ksr_distill.training.checkpoints import last_good_checkpoint
from ksr_distill.training.distillation import DistillationModule
from ksr_distill.training.preemption import EXIT_PREEMPTED

BATCH = 12
"""Divisible by 1, 2, 3 and 4 processes, with 1 or 2 micro-batches."""


def saving_every(num_updates: int, *more: str) -> tuple[str, ...]:
    every = f"callbacks.checkpoint.every_updates={num_updates}"
    return (f"data.batch_size={BATCH}", every, *more)


CASES = [
    # processes, workers, saved at, dies in
    (1, 0, 1, "turn"),
    (3, 0, 3, "turn"),
]
ALL_CASES = [
    (world, workers, saved, place)
    for world in (1, 2, 3, 4)
    for workers in (0, 2)
    for saved, place in ((1, "turn"), (3, "turn"), (6, "save"))
]


@pytest.mark.parametrize(
    ("world", "workers", "saved_at", "place"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL_CASES)],
)
def test_a_killed_run_continued_by_the_same_command_ends_bit_for_bit_equal(
    files: Path, tmp_path: Path, world: int, workers: int, saved_at: int, place: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = saving_every(saved_at, f"data.num_workers={workers}")
    Processes(world, run_train, whole, files=files, changes=changes).succeed(280)
    die = (saved_at, place)
    codes = Processes(world, run_train, parts, files=files, changes=changes, die=die).wait(280)
    assert -signal.SIGKILL in codes
    if saved_at < 6:
        assert last_good_checkpoint(parts / "run" / "checkpoints").stem == f"update-{saved_at:09d}"
    Processes(world, run_train, parts, files=files, changes=changes).succeed(280)
    assert digest_of_run(parts) == digest_of_run(whole)


def assert_each_sample_once_an_epoch(folder: Path, num_updates: int) -> None:
    positions = [position for seen in consumed(folder).values() for position in seen]
    assert sorted(positions) == list(range(num_updates * BATCH))


def test_no_sample_is_lost_or_doubled_when_the_number_of_processes_changes(
    files: Path, tmp_path: Path
) -> None:
    changes = saving_every(1)
    attempts = ((2, (2, "turn")), (3, (4, "turn")), (1, None))
    for attempt, (world, die) in enumerate(attempts):
        how = {"files": files, "changes": changes, "die": die, "attempt": attempt}
        Processes(world, run_train, tmp_path, **how).wait(280)
    assert_each_sample_once_an_epoch(tmp_path, 6)
    assert NUM_PHOTOS < BATCH  # several epochs, which end inside an update


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_20_kills_at_random_moments_change_no_bit_and_no_sample(
    files: Path, tmp_path: Path, world: int, workers: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = {"files": files, "changes": saving_every(2, f"data.num_workers={workers}")}
    Processes(world, run_train, whole, num_updates=100, **run).succeed(600)
    kill_20_times(parts, [world], **run)
    assert digest_of_run(parts) == digest_of_run(whole)
    assert_each_sample_once_an_epoch(parts, 100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
def test_20_kills_and_another_number_of_processes_each_time_lose_and_double_no_sample(
    files: Path, tmp_path: Path, workers: int
) -> None:
    changes = saving_every(2, f"data.num_workers={workers}")
    kill_20_times(tmp_path, [1, 2, 3, 4], files=files, changes=changes)
    assert_each_sample_once_an_epoch(tmp_path, 100)


def kill_20_times(parts: Path, worlds: list[int], **run: Any) -> None:
    """Start a run of 100 updates, kill it at a random moment, start it again; let the last end."""
    run["num_updates"], draws, kills = 100, random.Random(worlds[0]), 0
    while kills < 20:
        running = Processes(draws.choice(worlds), run_train, parts, attempt=kills, **run)
        trains = parts / f"consumed.{kills:03d}.0.jsonl"
        wait_until(lambda trains=trains, p=running.all[0]: trains.exists() or not p.is_alive(), 280)
        time.sleep(draws.uniform(0, 1))
        if not running.all[0].is_alive():
            break
        if draws.random() < 0.5:  # one rank first, the others when the launcher has noticed
            draws.choice(running.all).kill()
            time.sleep(draws.uniform(0, 2))
        running.kill()
        kills += 1
    assert kills >= 5
    Processes(worlds[0], run_train, parts, attempt=kills + 1, **run).succeed(600)


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def train_and_tell_threads(folder: Path, *, told_at: int | None, **run: Any) -> None:
    critic_turn = DistillationModule.critic_turn

    def told_turn(self: DistillationModule, *arguments: Any) -> Any:
        if self.update == told_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.update == 1:
            assert "gloo" in " ".join(threads())
        return critic_turn(self, *arguments)

    DistillationModule.critic_turn = told_turn
    try:
        run_train(folder, **run)
    finally:
        (folder / f"threads.{os.environ['RANK']}").write_text("\n".join(threads()))


@pytest.mark.parametrize(("told_at", "code"), [(None, 0), (1, EXIT_PREEMPTED)])
def test_a_process_leaves_without_threads_that_could_abort_it(
    files: Path, tmp_path: Path, told_at: int | None, code: int
) -> None:
    how = {"files": files, "changes": saving_every(9), "told_at": told_at, "num_updates": 3}
    running = Processes(2, train_and_tell_threads, tmp_path, **how)
    assert running.wait(120) == [code] * 2, running.logs()
    for rank in range(2):
        assert "gloo" not in (tmp_path / f"threads.{rank}").read_text()


def test_a_run_that_has_ended_is_not_trained_again(files: Path, tmp_path: Path) -> None:
    Processes(1, run_train, tmp_path, files=files, num_updates=2).succeed(280)
    end = digest_of_run(tmp_path)
    Processes(1, run_train, tmp_path, files=files, num_updates=2, attempt=1).succeed(280)
    assert digest_of_run(tmp_path) == end
    assert not list(tmp_path.glob("consumed.001.*"))
