import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksr_distill.inference.devices import memory
from ksr_distill.inference.devices.memory import free_memory_bytes

MB = 1 << 20


def make_cgroup(folder, *, limit, used, read_files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {read_files}\nslab 2\n")


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Return a root of cgroups, of which this process is in job/step."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/job/step\n")
    return tmp_path


def test_files_that_were_read_leave_a_container_its_memory(cgroups):
    make_cgroup(cgroups, limit=300 * MB, used=280 * MB, read_files=200 * MB)
    assert free_memory_bytes(torch.device("cpu")) == 220 * MB


def test_a_jobs_limit_counts_wherever_it_is_set(cgroups):
    make_cgroup(cgroups / "job", limit=100 * MB, used=40 * MB, read_files=0)
    make_cgroup(cgroups / "job/step", limit="max", used=40 * MB, read_files=0)
    assert free_memory_bytes(torch.device("cpu")) == 60 * MB


def test_limits_that_cannot_be_seen_are_none(cgroups):
    make_cgroup(cgroups / "job", limit=100 * MB, used=40 * MB, read_files=10 * MB)
    (cgroups / "job" / "memory.stat").unlink()
    assert free_memory_bytes(torch.device("cpu")) == 60 * MB
    (cgroups / "job" / "memory.current").unlink()
    assert free_memory_bytes(torch.device("cpu")) > 0


ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_from_fourfold_to_sixteenfold(tmp_path):
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", "1", "--scales", "4", "16"]
    subprocess.run([*command, "--json", str(tmp_path / "memory.json")], cwd=ROOT, check=True)
    fourfold, sixteenfold = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert sixteenfold["width"] == 16384
    # 647 or 660 MB, and 739 to 779, in several runs: the sixteenfold area takes up to a fifth more.
    assert sixteenfold["peak_mb"] <= 1.3 * fourfold["peak_mb"]
