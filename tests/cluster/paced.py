"""Runs a script with every update slowed down, so that a test can reach into it.

`python paced.py train.py …`: PACE_S a student turn, SKEW_S more for each rank. PYTHON of the
Slurm tests.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def pace() -> None:
    from ksr_distill.training.distillation import DistillationModule  # noqa: PLC0415

    student_turn = DistillationModule.student_turn
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    seconds = float(os.environ.get("PACE_S", "0")) + rank * float(os.environ.get("SKEW_S", "0"))
    dies = os.environ.get("DIES_AT", "").split(":")  # update:rank, in the first attempt
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

    def slow_turn(self: DistillationModule, *arguments: Any) -> Any:
        with (Path(os.environ["PACE_FOLDER"]) / f"at.{rank}").open("a") as file:
            file.write(f"{self.update}\n")
        if first and dies == [str(self.update), str(rank)]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        return student_turn(self, *arguments)

    DistillationModule.student_turn = slow_turn


if __name__ == "__main__":
    # As train.py does first of all: `pace` imports what it patches, which takes seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        pace()
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
