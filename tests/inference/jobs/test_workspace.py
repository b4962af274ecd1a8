"""Who may work in a target's folder of tiles."""

import errno
import fcntl
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from ksr_distill.inference.jobs import workspace
from ksr_distill.inference.jobs.workspace import Workspace, workspace_folder
from ksr_distill.locks import FileLock


def tiles(target):
    return sorted(path.name for path in workspace_folder(target).glob("*.tiles"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leave_tiles(target, job):
    with Workspace.open(target, job) as workspace:
        (workspace.folder / "pass0.tiles").touch()


def test_the_last_process_of_a_finished_job_removes_its_tiles(tmp_path):
    target = tmp_path / "big.png"
    with ExitStack() as other:
        with Workspace.open(target, {"seed": 1}, worker=0, num_workers=2) as first:
            other.enter_context(Workspace.open(target, {"seed": 1}, worker=1, num_workers=2))
            (first.folder / "pass0.tiles").touch()
            first.finish()
        assert tiles(target) == ["pass0.tiles"]  # the other may still read them
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_is_not_finished_leaves_its_tiles_to_the_next_of_its_kind(tmp_path):
    target = tmp_path / "big.png"
    leave_tiles(target, {"seed": 1})
    with Workspace.open(target, {"seed": 1}):
        assert tiles(target) == ["pass0.tiles"]
    with Workspace.open(target, {"seed": 2}):
        assert tiles(target) == []


@pytest.mark.parametrize("damaged", [b"null", b"", b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_another_jobs(tmp_path, damaged, caplog):
    target = tmp_path / "big.png"
    leave_tiles(target, {"seed": 1})
    (workspace_folder(target) / "job.json").write_bytes(damaged)
    with (
        pytest.raises(ValueError, match=r"ksr-work is from another job .* remove it and start all"),
        Workspace.open(target, {"seed": 1}, num_workers=2),
    ):
        pass
    with Workspace.open(target, {"seed": 1}):
        assert tiles(target) == []
    assert "begun anew" in caplog.text


def test_an_unfinished_job_is_not_removed_for_what_was_finished_before_it(tmp_path):
    target = tmp_path / "big.png"
    leave_tiles(target, {"seed": 1})
    (workspace_folder(target) / "finished").touch()  # as a kill after the last line leaves it
    leave_tiles(target, {"seed": 1})
    assert tiles(target) == ["pass0.tiles"]


def test_of_a_finished_job_nothing_is_in_the_way_of_another(tmp_path, caplog):
    target = tmp_path / "big.png"
    leave_tiles(target, {"seed": 1})
    (workspace_folder(target) / "finished").touch()
    with Workspace.open(target, {"seed": 2}, num_workers=2):
        assert tiles(target) == []
    assert caplog.text == ""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_of_many_starts_at_once_each_is_alone_with_its_kind_or_told_so(tmp_path, num_workers):
    target = tmp_path / "big.png"

    def start(number):
        job = {"seed": number % 3}
        try:
            with Workspace.open(target, job, worker=number, num_workers=num_workers) as workspace:
                mine = workspace.folder / f"{job['seed']}.tiles"
                mine.touch()
                time.sleep(random.Random(number).random() / 200)
                assert tiles(target) == [mine.name]
                workspace.finish()
        except ValueError as error:
            return "is being made by another process" in str(error)
        return "worked"

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(start, range(60)))
    assert set(results) <= {"worked", True}
    assert "worked" in results
    assert list(tmp_path.iterdir()) == []


def meet(target, *, worker, num_workers=2):
    with Workspace.open(target, {"seed": 1}, worker=worker, num_workers=num_workers) as workspace:
        (workspace.folder / "pass0.tiles").touch()
        workspace.finish()


def test_a_target_that_is_there_is_made_anew_when_all_have_come(tmp_path, caplog):
    (tmp_path / "big.png").touch()
    with ThreadPoolExecutor(3) as pool:
        come = [pool.submit(meet, tmp_path / "big.png", worker=i, num_workers=3) for i in range(3)]
    assert [each.exception() for each in come] == [None] * 3
    assert names(tmp_path) == ["big.png"]
    assert "big.png is there already: waiting for all 3 processes" in caplog.text


@pytest.mark.parametrize("worker", [0, 1])
def test_one_that_comes_late_to_a_finished_job_waits_ten_minutes_and_leaves_nothing(
    tmp_path, monkeypatch, worker
):
    monkeypatch.setattr(workspace, "MEET_SECONDS", 0)
    (tmp_path / "big.png").touch()
    with pytest.raises(ValueError, match=r"big\.png is there already, and only 1 of 2 processes"):
        meet(tmp_path / "big.png", worker=worker)
    assert names(tmp_path) == ["big.png"]


def test_one_that_comes_back_to_a_job_at_work_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "MEET_SECONDS", 0)
    target = tmp_path / "big.png"
    with Workspace.open(target, {"seed": 1}, worker=0, num_workers=2) as first:
        meet(target, worker=1)
        target.touch()
        meet(target, worker=1)
        first.finish()
    assert names(tmp_path) == ["big.png"]


def test_one_that_was_killed_while_it_waited_is_not_waited_with(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "MEET_SECONDS", 0)
    target = tmp_path / "big.png"
    target.touch()
    workspace_folder(target).mkdir()
    (workspace_folder(target) / "1.came").touch()
    with pytest.raises(ValueError, match="only 1 of 2 processes"):
        meet(target, worker=0)


def test_one_that_gave_up_is_not_counted_by_those_that_still_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "MEET_SECONDS", 0)
    target = tmp_path / "big.png"
    with Workspace.open(target, {"seed": 1}, worker=0, num_workers=3) as first:
        target.touch()
        with pytest.raises(ValueError, match="only 2 of 3 processes"):
            meet(target, worker=1, num_workers=3)
        assert names(first.folder) == ["0.came", "job.json", "job.lock"]


def test_a_target_that_is_removed_is_waited_for_no_longer(tmp_path, monkeypatch):
    target = tmp_path / "big.png"
    target.touch()
    monkeypatch.setattr(time, "sleep", lambda _: target.unlink())
    meet(target, worker=1)
    assert names(tmp_path) == []


def test_a_lock_in_a_folder_that_was_removed_meanwhile_is_taken_again(tmp_path):
    lock = FileLock(tmp_path / "job.lock")
    assert lock.take_alone()
    lock.path.unlink()
    again = FileLock(tmp_path / "job.lock")
    assert again.take_alone()
    assert (lock.is_in_place(), again.is_in_place()) == (False, True)
    lock.release()
    again.release()


def test_a_file_system_without_locks_is_worked_on_and_another_error_is_not_hidden(
    tmp_path, monkeypatch
):
    def fail(number):
        def flock(*_):
            raise OSError(number, "no")

        monkeypatch.setattr(fcntl, "flock", flock)

    fail(errno.ENOLCK)
    with Workspace.open(tmp_path / "big.png", {"seed": 1}) as workspace:
        workspace.finish()
    assert list(tmp_path.iterdir()) == []
    fail(errno.EIO)
    with (
        pytest.raises(OSError, match="no"),
        Workspace.open(tmp_path / "big.png", {"seed": 1}),
    ):
        pass
