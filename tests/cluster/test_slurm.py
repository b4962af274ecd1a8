"""A real Slurm on localhost: told to go, preempted, killed, out of time; it continues, equal."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Processes, wait_until
from real_run import digest_of_run, overrides, run_train

from slurm import ONE_TASK, TWO_TASKS, Slurm, paced_python

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
BATCH = "data.batch_size=4"


@pytest.fixture(scope="session")
def reference(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The uninterrupted run that every other has to equal, bit for bit."""
    folder = tmp_path_factory.mktemp("reference")
    Processes(2, run_train, folder, files=files, changes=(BATCH,), num_updates=12).succeed(120)
    return digest_of_run(folder)


def arguments(files: Path, folder: Path, *more: str) -> list[str]:
    here = [f"hydra.run.dir={folder}/run", "trainer.devices=1", "trainer.num_nodes=2", BATCH]
    return [*overrides(files, num_updates=12), *here, *more]


def train(slurm: Slurm, files: Path, folder: Path, *more: str, **options: Any) -> str:
    """Submit slurm/train.sbatch on two tasks; its ranks are skewed, as GPUs are."""
    pace = {"PACE_S": 0.2, "SKEW_S": 0.15, **options.get("pace", {})}
    slurm.env |= paced_python(folder, **pace)
    sbatch = (*TWO_TASKS, *options.get("sbatch", ()))
    log = folder / "log.txt"
    return slurm.submit(
        "slurm/train.sbatch", *arguments(files, folder, *more), sbatch=sbatch, log=log
    )


def updates_seen(folder: Path, rank: int = 0) -> int:
    path = folder / f"at.{rank}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_continued(slurm: Slurm, job: str, folder: Path, reference: str) -> None:
    fields, log = slurm.wait(job), folder / "log.txt"
    assert fields["JobState"] == "COMPLETED", log.read_text()[-3000:]
    assert int(fields["Restarts"]) >= 1
    assert "resuming" in (folder / "run" / "train.log").read_text()
    assert digest_of_run(folder) == reference


def test_usr1_saves_on_all_ranks_requeues_and_ends_equal(
    slurm: Slurm, files: Path, tmp_path: Path, reference: str
) -> None:
    job = train(slurm, files, tmp_path)
    wait_until(lambda: updates_seen(tmp_path) >= 3, 120)
    slurm.sh("scancel", "--signal=USR1", job)
    assert_continued(slurm, job, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["main", "grace"])
def test_preempted_with_and_without_grace_time(
    slurm: Slurm, files: Path, tmp_path: Path, reference: str, partition: str
) -> None:
    job = train(slurm, files, tmp_path, sbatch=(f"--partition={partition}",))
    wait_until(lambda: updates_seen(tmp_path) >= 3, 120)
    high = slurm.sh(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--ntasks-per-node=2",
        "--output=/dev/null", "--wrap", "sleep 1",
    )  # fmt: skip
    slurm.wait(high)
    assert_continued(slurm, job, tmp_path, reference)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_soon_and_the_requeued_one_ends_equal(
    slurm: Slurm, files: Path, tmp_path: Path, reference: str
) -> None:
    every = "callbacks.checkpoint.every_updates=2"
    job = train(slurm, files, tmp_path, every, pace={"DIES_AT": "5:1"})
    wait_until(lambda: updates_seen(tmp_path, rank=1) >= 5, 120)
    began = time.monotonic()
    assert slurm.wait(job)["JobState"] == "FAILED"
    assert time.monotonic() - began < 30
    slurm.sh("scontrol", "requeue", job)
    assert_continued(slurm, job, tmp_path, reference)


@pytest.mark.slow
def test_the_wall_limit_is_met_with_a_save_and_a_requeue(
    slurm: Slurm, files: Path, tmp_path: Path, reference: str
) -> None:
    """A limit of two minutes, a signal 50 s before (or up to 60 s earlier): several such slots."""
    job = train(
        slurm, files, tmp_path, pace={"PACE_S": 10}, sbatch=("--time=2", "--signal=USR1@50")
    )  # fmt: skip
    fields = slurm.wait(job, timeout=600)
    assert int(fields["Restarts"]) >= 1
    assert_continued(slurm, job, tmp_path, reference)


def sweep_arguments(files: Path, folder: Path) -> list[str]:
    here = [f"hydra.sweep.dir={folder}/sweep", BATCH, "+sweep=student_timesteps"]
    return [*overrides(files, num_updates=4), *here]


def assert_summary_of_four(folder: Path, *, failed: str | None = None) -> None:
    table = (folder / "sweep" / "summary.md").read_text()
    for steps in (1, 2, 4, 8):
        [line] = [row for row in table.splitlines() if row.startswith(f"| steps_{steps} ")]
        expected = "not finished" if failed == f"steps_{steps}" else "finished | 4 of 4"
        assert expected in line, table
        config = yaml.safe_load((folder / "sweep" / f"steps_{steps}" / "config.yaml").read_text())
        assert config["diffusion"]["num_inference_steps"] == steps
        assert config["group"] == "run/student_timesteps"


@pytest.mark.slow
def test_a_sweep_of_four_as_an_array_and_one_element_signalled(
    slurm: Slurm, files: Path, tmp_path: Path
) -> None:
    slurm.env |= paced_python(tmp_path, PACE_S=0.3)
    sbatch = (*ONE_TASK, "--array=0-3")
    log = tmp_path / "log-%a.txt"
    job = slurm.submit(
        "slurm/sweep.sbatch", *sweep_arguments(files, tmp_path), sbatch=sbatch, log=log
    )
    wait_until(lambda: updates_seen(tmp_path) >= 1, 120)
    slurm.sh("scancel", "--signal=USR1", f"{job}_1")
    for element in range(4):
        fields = slurm.wait(f"{job}_{element}")
        told = (tmp_path / f"log-{element}.txt").read_text()[-3000:]
        assert fields["JobState"] == "COMPLETED", told
    assert_summary_of_four(tmp_path)


@pytest.mark.slow
def test_a_sweep_of_four_through_submitit(slurm: Slurm, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the [slurm] extra is not installed")
    launcher = [
        "+launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=1",
        "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10",
    ]  # fmt: skip
    slurm.sh(*train_command(), *sweep_arguments(files, tmp_path), *launcher)
    assert_summary_of_four(tmp_path)


def train_command() -> list[str]:
    from real_run import command  # noqa: PLC0415

    return command()
