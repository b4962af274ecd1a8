"""How long a save pauses training, which share of a run that is, and how much memory it takes.

    python -m benchmarks.checkpointing                             # 413 M: a minute on a GPU
    python -m benchmarks.checkpointing model=mini_x2 critic=mini   # on a CPU

A distillation's module and optimisers are saved as `callbacks.checkpoint` does: weights, average
and the moments of both networks, in the foreground, and by a thread, as `background_above_mb`
selects. Meanwhile a loop makes small updates without ever waiting, the worst case, since its host
has no idle time. What counts is its total loss: the copy, and the slowdown while the thread writes.
Host memory is the whole machine's, without the page cache.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.measuring import RESULTS, phase, wait_for, write_results
from benchmarks.modules import build_module, composed, write_random_teacher
from ksr_distill.training.base import UpdateModule
from ksr_distill.training.checkpoint_folder import path_of_update
from ksr_distill.training.checkpoint_io import AtomicCheckpointIO

INTERVALS_MIN = (2, 10, 30)
SHARES = "".join(f" {minutes} min |" for minutes in INTERVALS_MIN)
SAVES = {"foreground": 1, "background": 2}
"""The thread's first save allocates pinned memory; the second is as in a run."""


class Pause(NamedTuple):
    """The cost of a save, in seconds and GB.

    Attributes:
        pause_s: Between two updates.
        lost_s: The pause, and the slowdown of updates until the file was on disk.
        on_disk_s: Until the file was on disk.
        host_gb: Peak increase of host memory.
    """

    pause_s: float
    lost_s: float
    on_disk_s: float
    host_gb: float


def make_module(overrides: Sequence[str], device: torch.device) -> UpdateModule:
    """Return a distillation's module on the device, as conf/train.yaml has it, not compiled."""
    with tempfile.TemporaryDirectory() as folder:
        config = composed(f"teacher={folder}", "compile_networks=false", *overrides)
        write_random_teacher(Path(folder), config["model"], device)
        return build_module(config, device)


def state_of(module: UpdateModule) -> dict[str, Any]:
    """Return the content of a checkpoint of the module, with moments as after an update."""
    optimizers = module.configure_optimizers()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    states = [optimizer.state_dict() for optimizer in optimizers]
    return {"state_dict": module.state_dict(), "optimizer_states": states}


class Loop:
    """The host of a training loop: one update after the other, without idle time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matrix = torch.rand(256, 256, device=device)
        self.mean_update_s()

    def update(self) -> float:
        """Return how long an update took."""
        began = time.perf_counter()
        for _ in range(20):
            self.matrix = (self.matrix @ self.matrix).sigmoid()
        wait_for(self.device)
        return time.perf_counter() - began

    def mean_update_s(self, *, seconds: float = 1.0) -> float:
        """Return how long an update takes now, under the machine's other load."""
        end, updates = time.perf_counter() + seconds, []
        while time.perf_counter() < end:
            updates.append(self.update())
        return statistics.mean(updates)


def save(loop: Loop, io: AtomicCheckpointIO, state: dict[str, Any], path: Path) -> Pause:
    """Save between two updates, and wait until it is on the disk."""
    usual_s = loop.mean_update_s()
    before = psutil.virtual_memory().used
    began = time.perf_counter()
    io.save_checkpoint(state, path)
    pause_s = time.perf_counter() - began
    meanwhile, used = [], psutil.virtual_memory().used
    while io.is_writing:
        meanwhile.append(loop.update())
        if len(meanwhile) % 100 == 0:
            used = max(used, psutil.virtual_memory().used)
    io.wait()
    on_disk_s = time.perf_counter() - began
    if io.failure:
        raise OSError(io.failure)
    usual_s = (usual_s + loop.mean_update_s()) / 2
    lost_s = pause_s + sum(meanwhile) - len(meanwhile) * usual_s
    return Pause(pause_s, lost_s, on_disk_s, (used - before) / 1e9)


def measure(name: str, io: AtomicCheckpointIO, loop: Loop, state: Any, folder: Path) -> Any:
    """Save a number of times; the first is labelled where there are others."""
    pauses = []
    for number in range(SAVES[name]):
        path = path_of_update(folder, number)
        pauses.append(save(loop, io, state, path))
        io.remove_checkpoint(path)
    later = pauses[1:] or pauses
    lost_s = statistics.mean(pause.lost_s for pause in later)
    return {
        "mode": name,
        "first_pause_s": round(pauses[0].pause_s, 3),
        "pause_s": round(statistics.mean(pause.pause_s for pause in later), 3),
        "lost_s": round(lost_s, 3),
        "on_disk_s": round(statistics.mean(pause.on_disk_s for pause in later), 3),
        "host_gb": round(pauses[0].host_gb, 1),
        "share_percent": {
            str(minutes): round(100 * lost_s / (60 * minutes), 2) for minutes in INTERVALS_MIN
        },
    }


def bytes_of(state: dict[str, Any]) -> int:
    """Return the bytes of a checkpoint's tensors."""
    moments = [
        tensor
        for optimizer in state["optimizer_states"]
        for values in optimizer["state"].values()
        for tensor in values.values()
    ]
    return sum(tensor.nbytes for tensor in [*state["state_dict"].values(), *moments])


def main(arguments_given: Sequence[str] | None = None) -> None:
    """Measure both ways in the same run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder")
    parser.add_argument("--json", type=Path, default=RESULTS / "checkpointing.json")
    arguments = parser.parse_args(arguments_given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        with phase("made the module"):
            module = make_module(arguments.overrides, device)
            state, loop = state_of(module), Loop(device)
        rows = []
        for name, above_mb in (("foreground", float("inf")), ("background", 0.0)):
            with phase(name):
                io = AtomicCheckpointIO(background_above_mb=above_mb)
                rows.append(measure(name, io, loop, state, folder))
    finally:
        shutil.rmtree(folder)
    gb = round(bytes_of(state) / 1e9, 2)
    columns = "pause, s | lost in all, s | on the disk after, s | host memory, GB"
    print(f"\n{gb} GB | {columns} | share every{SHARES}")
    for row in rows:
        figures = [row[key] for key in ("mode", "pause_s", "lost_s", "on_disk_s", "host_gb")]
        shares = [f"{share} %" for share in row["share_percent"].values()]
        print(" | ".join(map(str, [*figures, *shares])))
    write_results(arguments.json, {"overrides": arguments.overrides, "state_gb": gb, "rows": rows})


if __name__ == "__main__":
    main()
