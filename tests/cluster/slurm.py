"""A throw-away Slurm on localhost (slurm_local.sh), as a test talks to it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_run import ROOT, environment

HERE = Path(__file__).parent
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


class Slurm:
    def __init__(self, conf: str) -> None:
        # n1 and n2 are no host names: say where rank 0 is. Unset, each job finds its own port.
        self.env = environment(SLURM_CONF=conf, MASTER_ADDR="127.0.0.1")
        self.env.pop("MASTER_PORT", None)

    def sh(self, *command: Any) -> str:
        told = subprocess.run(
            [str(part) for part in command],
            env=self.env, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not told.returncode, f"{command}: {told.stderr}"
        return told.stdout.strip()

    def submit(self, script: str, *arguments: Any, sbatch: tuple[str, ...], log: Path) -> str:
        options = ["--parsable", "--time=30", f"--output={log}", *sbatch]
        return self.sh("sbatch", *options, script, *arguments).split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.sh("scontrol", "show", "job", "-o", job)))

    def wait(self, job: str, timeout: float = 240) -> dict[str, str]:
        end = time.monotonic() + timeout
        while (fields := self.job(job))["JobState"] not in TERMINAL:
            assert time.monotonic() < end, fields
            time.sleep(0.2)
        return fields


def start_slurm() -> Iterator[Slurm]:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [exe for exe in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(exe)]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)}: apt-get install --no-install-recommends slurmctld slurmd "
            "slurm-client munge"
        )
    folder = tempfile.mkdtemp(prefix="slurm", dir="/tmp")  # munge wants a short socket path
    local = [str(HERE / "slurm_local.sh")]
    subprocess.run([*local, "start", folder], check=True)
    try:
        yield Slurm(f"{folder}/slurm.conf")
    finally:
        subprocess.run([*local, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def paced_python(folder: Path, **pace: Any) -> dict[str, str]:
    """Return PYTHON and its environment: a Python whose updates take their time."""
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "paced.py"} "$@"\n')
    wrapper.chmod(0o755)
    told = {name: str(value) for name, value in pace.items()}
    return {"PYTHON": str(wrapper), "PACE_FOLDER": str(folder), **told}
