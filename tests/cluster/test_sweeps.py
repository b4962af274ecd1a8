"""A sweep: one folder a run, a failed run stops no other, and a table tells what became of each."""

import subprocess
from pathlib import Path

import pytest
from real_run import command, environment, overrides

from ksr_distill.training.launching import (
    check_tasks_of_slurm,
    process_plugins,
    refuse_launcher_in_sweep,
)
from ksr_distill.training.sweeps import RUN_FOLDER, point_overrides, sweep_points


def test_an_array_sees_the_points_of_a_sweep() -> None:
    assert sweep_points("student_timesteps") == [
        [f"diffusion.num_inference_steps={n}"] for n in (1, 2, 4, 8)
    ]
    assert len(sweep_points("critic")) == 9
    told = point_overrides(2, ["+experiment=ksr_flash", "+sweep=student_timesteps"])
    assert told == ["hydra.mode=RUN", RUN_FOLDER, "diffusion.num_inference_steps=4"]


def test_a_point_or_a_sweep_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="--array=0-3"):
        point_overrides(4, ["+sweep=student_timesteps"])
    with pytest.raises(ValueError, match="use critic, student_timesteps"):
        point_overrides(0, ["+sweep=student_timestep"])
    with pytest.raises(ValueError, match=r"\+sweep=NAME"):
        point_overrides(0, ["+experiment=ksr_flash"])


@pytest.mark.parametrize(
    "other", ["diffusion.num_inference_steps=3,5", "hydra.sweeper.params={seed:'0,1'}"]
)
def test_an_array_does_not_pass_over_other_points_on_its_command_line(other: str) -> None:
    with pytest.raises(ValueError, match=r"those of conf/sweep/student_timesteps\.yaml; copy it"):
        point_overrides(0, ["+sweep=student_timesteps", other])


@pytest.mark.parametrize(
    ("num_processes", "environment", "remedy"),
    [
        (8, {}, r"8 processes in a sweep.*\+launcher=slurm"),
        (2, {"TORCHELASTIC_RUN_ID": "x"}, r"torchrun with a sweep.*slurm/sweep\.sbatch"),
    ],
)
def test_a_launcher_that_would_start_the_sweep_again_is_refused(
    num_processes: int, environment: dict[str, str], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        refuse_launcher_in_sweep(
            num_processes=num_processes, is_sweep=True, environment=environment
        )


def test_a_job_of_its_own_and_a_single_process_may_be_part_of_a_sweep() -> None:
    for num_processes, here in ((8, {"SLURM_NTASKS": "8"}), (1, {})):
        refuse_launcher_in_sweep(num_processes=num_processes, is_sweep=True, environment=here)
    refuse_launcher_in_sweep(num_processes=8, is_sweep=False, environment={})


def test_under_slurm_lightnings_own_requeue_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    [plugin] = process_plugins()
    assert plugin.auto_requeue is False
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert process_plugins() == []


def test_another_number_of_processes_than_slurms_tasks_is_refused() -> None:
    """`sbatch --ntasks=1 --ntasks-per-node=2`: Slurm tells both, and starts one."""
    here = {"SLURM_NTASKS": "2"}
    for devices, num_nodes in ((1, 1), (2, 2), (8, 1)):
        with pytest.raises(ValueError, match=r"this Slurm job has 2 tasks; submit with --nodes"):
            check_tasks_of_slurm({"devices": devices, "num_nodes": num_nodes}, here)
    for devices in (1, "auto"):
        check_tasks_of_slurm({"devices": devices, "num_nodes": 2}, here)
    for more in ({"TORCHELASTIC_RUN_ID": "x"}, {"SLURM_JOB_NAME": "bash"}):
        check_tasks_of_slurm({"devices": 8, "num_nodes": 1}, here | more)


@pytest.fixture(scope="module")
def swept(
    files: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A sweep of two runs, of which the first fails: how it ended, and its folder."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = [
        *(text for text in overrides(files, num_updates=2) if "val_check_interval" not in text),
        f"hydra.sweep.dir={folder}/sweep",
        "+sweep=student_timesteps",
        "+launcher=local",
        "hydra.sweeper.params={diffusion.num_inference_steps:'0,2'}",
    ]
    ended = subprocess.run(
        command(*sweep), cwd=folder, env=environment(PYTHONWARNINGS="default"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ended, folder / "sweep"


def test_a_failed_run_stops_no_other_and_the_table_tells_why(
    swept: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ended, folder = swept
    assert ended.returncode != 0
    table = (folder / "summary.md").read_text()
    assert "| steps_0 | not finished | 0 of 2 |" in table, ended.stderr
    assert "| steps_2 | finished | 2 of 2 |" in table
    assert "num_inference_steps" in table  # what the failed one needs


def test_lightnings_hints_that_nobody_can_act_on_are_not_shown(
    swept: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    told = swept[0].stdout + swept[0].stderr
    assert "training critic (" in told
    for hint in ("Tip:", "TPU", "eval mode", "LeafSpec", "srun", "FLOPs", "max_epochs"):
        assert hint not in told, told
