"""The cluster tests' helpers lie beside them; the forked processes import them by name as well."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from slurm import Slurm

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [HERE, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator["Slurm"]:
    from slurm import start_slurm  # noqa: PLC0415, only these tests need it

    yield from start_slurm()


@pytest.fixture
def slurm(slurm_cluster: "Slurm") -> Iterator["Slurm"]:
    """The cluster; nothing is left running on it."""
    before = dict(slurm_cluster.env)
    yield slurm_cluster
    slurm_cluster.env = before
    slurm_cluster.sh("scancel", "--user", os.getuid())
    end = time.monotonic() + 20
    while slurm_cluster.sh("squeue", "-h") and time.monotonic() < end:
        time.sleep(0.1)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of noise and a teacher of random weights."""
    from real_run import make_shards, make_teacher  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("files")
    make_shards(folder)
    make_teacher(folder)
    return folder
