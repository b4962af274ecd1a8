"""Runs train.py as it is; every rank tells at the end what it holds, or is signalled on the way.

`torchrun … watched.py train.py …`: TELL a folder, SIGNAL_AT update:rank:number.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any


def watch() -> None:
    import torch  # noqa: PLC0415, train.py blocks signals before such imports
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    from ksr_distill.training.distillation import DistillationModule  # noqa: PLC0415

    student_turn, rank = DistillationModule.student_turn, int(os.environ["RANK"])
    moment = [int(number) for number in os.environ.get("SIGNAL_AT", "").split(":") if number]
    began: list[float] = []

    def signalled_turn(self: DistillationModule, *arguments: Any) -> Any:
        if [self.update, rank] == moment[:2]:
            os.kill(os.getpid(), moment[2])
        began.append(time.monotonic())
        return student_turn(self, *arguments)

    def tell(self: DistillationModule) -> None:
        sha = hashlib.sha256()
        for weight in self.student.parameters():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            sha.update(whole.detach().cpu().numpy().tobytes())
        told = {"sha256": sha.hexdigest(), "updates_per_s": rate(began), "memory_gb": 0.0}
        if torch.cuda.is_available():
            told["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        (Path(os.environ["TELL"]) / f"told.{rank}.json").write_text(json.dumps(told))

    DistillationModule.student_turn = signalled_turn
    DistillationModule.on_train_end = tell


def rate(began: list[float]) -> float:
    """Return the updates a second of the second half, when kernels have been chosen."""
    half = began[len(began) // 2 :]
    return (len(half) - 1) / (half[-1] - half[0])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    watch()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
