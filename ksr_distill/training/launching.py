"""Checks and plugins for how a run was launched: torchrun, srun, submitit or Lightning itself."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def process_plugins() -> list[Any]:
    """Return the Trainer's plugins: under srun, Slurm's environment without Lightning's requeue.

    Lightning's requeue saves inside the signal handler; see ``training/preemption.py``.
    """
    if TorchElasticEnvironment.detect() or not _is_under_slurm(os.environ):
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def check_tasks_of_slurm(trainer: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Refuse a number of processes that Slurm has not started: they would wait for each other.

    Raises:
        ValueError: With both numbers, and where each is set.
    """
    devices, num_nodes = trainer["devices"], trainer["num_nodes"]
    is_torchrun = "TORCHELASTIC_RUN_ID" in environment
    if is_torchrun or not _is_under_slurm(environment) or not isinstance(devices, int):
        return
    started = int(environment["SLURM_NTASKS"])
    if devices > 0 and devices * num_nodes != started:
        raise ValueError(
            f"trainer.devices={devices} on trainer.num_nodes={num_nodes} are {devices * num_nodes} "
            f"processes, and this Slurm job has {started} tasks; submit with --nodes and "
            "--ntasks-per-node and without --ntasks, as slurm/train.sbatch does"
        )


def refuse_launcher_in_sweep(
    *, num_processes: int, is_sweep: bool, environment: Mapping[str, str]
) -> None:
    """Check that a run of a sweep does not start processes that would start the sweep again.

    Lightning's launcher starts the same command once more for each further process, and torchrun
    runs the whole command on every rank: with ``-m`` in it, each would begin the whole sweep.

    Args:
        num_processes: Of this run, over all nodes.
        is_sweep: Whether Hydra runs in MULTIRUN mode.
        environment: Of this process.

    Raises:
        ValueError: With what to use instead.
    """
    if not is_sweep or _is_under_slurm(environment):
        return
    if "TORCHELASTIC_RUN_ID" in environment:
        raise ValueError(
            "torchrun with a sweep (-m, +sweep): every rank would begin the whole sweep; use "
            "+launcher=slurm, slurm/sweep.sbatch, or one torchrun for each run"
        )
    if num_processes > 1:
        raise ValueError(
            f"trainer.devices and num_nodes ask for {num_processes} processes in a sweep: each "
            "would begin the whole sweep; use +launcher=slurm, slurm/sweep.sbatch, "
            "trainer.devices=1, or one torchrun for each run"
        )


def _is_under_slurm(environment: Mapping[str, str]) -> bool:
    """Decide as Lightning does: where it alone found Slurm, it would bring its own requeue."""
    is_shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in environment and not is_shell
