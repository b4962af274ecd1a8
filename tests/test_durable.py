import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ksr_distill.durable import replace_file, replacing


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    with replacing(tmp_path / "a.txt") as new:
        new.write_text("new")
        assert not (tmp_path / "a.txt").exists()
        assert new.suffix == ".txt"  # writers look at it
    assert content(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_the_old_one_is_there_and_nothing_else(tmp_path, kind):
    old = tmp_path / "a" / "old.txt" if kind == "folder" else tmp_path / "a"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    before = content(tmp_path)

    def fail_halfway():
        with replacing(tmp_path / "a") as new:
            new.mkdir() if kind == "folder" else new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert content(tmp_path) == before


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    with replacing(tmp_path / "a") as new:
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "new.txt").write_text("new")
    assert content(tmp_path) == {"a/deep/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_everything_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda n: events.append(Path(f"/proc/self/fd/{n}").readlink()))
    with replacing(tmp_path / "a") as new:
        new.mkdir()
        (new / "b").write_text("b")
    assert events == [new / "b", new, tmp_path]


def test_a_block_that_makes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from ksr_distill.durable import replacing
with replacing(Path(sys.argv[1])) as new:
    new.write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_a_killed_process_left_goes_when_the_next_one_is_done(tmp_path):
    target = tmp_path / "a[1].txt"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert killed.returncode == -signal.SIGTERM
    assert list(content(tmp_path).values()) == ["half"]
    others = [tmp_path / name for name in (".a[1].txt.ksr-work", ".a1.txt.new-abcdefgh")]
    for folder in others:
        folder.mkdir()
    with pytest.raises(ZeroDivisionError), replacing(target):
        raise ZeroDivisionError
    assert list(content(tmp_path).values()) == ["half"]  # it may hold the only copy of a folder
    with replacing(target) as new:
        new.write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])
    assert target.read_text() == "new"


def test_what_a_living_process_writes_is_not_taken_for_an_orphan(tmp_path):
    with replacing(tmp_path / "a") as late:
        late.write_text("late")
        with replacing(tmp_path / "a") as early:
            early.write_text("early")
        assert content(tmp_path)["a"] == "early"
    assert content(tmp_path) == {"a": "late"}


def test_many_that_replace_one_target_at_once_all_succeed(tmp_path):
    def replace(number):
        with replacing(tmp_path / "a") as new:
            new.write_text(f"{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(replace, range(100)))
    assert list(content(tmp_path)) == ["a"]


def test_a_file_system_without_locks_keeps_orphans(tmp_path, monkeypatch):
    orphan = tmp_path / ".a.new-abcdefgh"
    orphan.mkdir()

    def flock(*_):
        raise OSError(errno.EBADF, "a folder on NFS")

    monkeypatch.setattr(fcntl, "flock", flock)
    with replacing(tmp_path / "a") as new:
        new.write_text("new")
    assert sorted(tmp_path.iterdir()) == [orphan, tmp_path / "a"]


def test_a_small_file_is_on_the_disk_before_its_name_changes(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda n: events.append(Path(f"/proc/self/fd/{n}").readlink()))
    replace_file(tmp_path / "a.json", b"old")
    replace_file(tmp_path / "a.json", b"new")
    assert events == 2 * [tmp_path / "a.json.tmp", tmp_path]
    assert content(tmp_path) == {"a.json": "new"}


def test_a_disk_without_room_leaves_the_small_file_as_it_was(tmp_path, monkeypatch):
    replace_file(tmp_path / "a.json", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a.json", b"new")
    assert content(tmp_path) == {"a.json": "old"}
