"""How long training stands still for a save, and which share of a run that is.

    python -m benchmarks.checkpointing                    # 413 M parameters: needs 16 GB of memory
    python -m benchmarks.checkpointing --parameters 1e8

A loop that never waits makes small updates while a state of the size of a full run's (the student,
its average, two moments each, float32) is saved: in the foreground, and by the thread, as
`callbacks.checkpoint.background_above_mb` chooses. Counted is what the loop lost in all, the copy
and what the thread takes from it while it writes. On a GPU the state lies there.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import RESULTS, phase, wait_for, write_results
from ksr_distill.training.checkpoint_folder import path_of_update
from ksr_distill.training.checkpoint_io import AtomicCheckpointIO

FULL_SIZE = 413_205_251
TENSORS = 400
"""The full network has about as many."""
INTERVALS_MIN = (2, 10, 30)
SHARES = "".join(f" {minutes} min |" for minutes in INTERVALS_MIN)
Pause = tuple[float, float, float]


def make_state(parameters: int, device: torch.device) -> dict[str, Any]:
    """Return weights, average and both moments as a checkpoint holds them."""
    size = parameters // TENSORS

    def network() -> dict[str, torch.Tensor]:
        return {f"layer.{i}": torch.rand(size, device=device) for i in range(TENSORS)}

    moments = {
        i: {"exp_avg": m, "exp_avg_sq": v}
        for i, (m, v) in enumerate(zip(network().values(), network().values(), strict=True))
    }
    weights = {
        f"{name}.{k}": v for name in ("student", "student_ema") for k, v in network().items()
    }
    return {"state_dict": weights, "optimizer_states": [{"state": moments}]}


class Loop:
    """A training loop's host: an update after the other, each as long as its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matrix = torch.rand(256, 256, device=device)
        self.mean_update_s(updates=300)

    def update(self) -> float:
        """Return how long an update took."""
        began = time.perf_counter()
        for _ in range(20):
            self.matrix = (self.matrix @ self.matrix).sigmoid()
        wait_for(self.device)
        return time.perf_counter() - began

    def mean_update_s(self, *, updates: int) -> float:
        """Return how long an update takes now, beside whatever else the machine does."""
        return statistics.mean(self.update() for _ in range(updates))


def save(loop: Loop, io: AtomicCheckpointIO, state: dict[str, Any], path: Path) -> Pause:
    """Save between two updates; return seconds: of the pause, lost in all, until it is on the disk.

    Lost is what the updates took until the file was on the disk, beyond what as many take before
    and after it.
    """
    usual_s = loop.mean_update_s(updates=500)
    began = time.perf_counter()
    io.save_checkpoint(state, path)
    pause = time.perf_counter() - began
    meanwhile = []
    while io.is_writing:
        meanwhile.append(loop.update())
    io.wait()
    on_disk = time.perf_counter() - began
    if io.failure:
        raise OSError(io.failure)
    usual_s = (usual_s + loop.mean_update_s(updates=500)) / 2
    return pause, pause + sum(meanwhile) - len(meanwhile) * usual_s, on_disk


def measure(name: str, io: AtomicCheckpointIO, loop: Loop, state: Any, folder: Path) -> Any:
    """Save three times; the first pays for pinned memory, the others are as in a run."""
    pauses = []
    for number in range(3):
        path = path_of_update(folder, number)
        pauses.append(save(loop, io, state, path))
        io.remove_checkpoint(path)
    lost = statistics.mean(lost for _, lost, _ in pauses[1:])
    return {
        "mode": name,
        "first_pause_s": round(pauses[0][0], 3),
        "pause_s": round(statistics.mean(pause for pause, _, _ in pauses[1:]), 3),
        "lost_s": round(lost, 3),
        "on_disk_s": round(statistics.mean(on_disk for _, _, on_disk in pauses[1:]), 2),
        "share_percent": {
            str(minutes): round(100 * lost / (60 * minutes), 2) for minutes in INTERVALS_MIN
        },
    }


def main() -> None:
    """Measure both ways in the same run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=float, default=FULL_SIZE)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder")
    parser.add_argument("--json", type=Path, default=RESULTS / "checkpointing.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        with phase("made the state"):
            state, loop = make_state(int(arguments.parameters), device), Loop(device)
        rows = []
        for name, above_mb in (("foreground", float("inf")), ("background", 0.0)):
            with phase(name):
                io = AtomicCheckpointIO(background_above_mb=above_mb)
                rows.append(measure(name, io, loop, state, folder))
    finally:
        shutil.rmtree(folder)
    gb = sum(t.nbytes for t in state["state_dict"].values()) * 2 / 1e9
    print(f"\n{gb:.1f} GB | pause, s | lost in all, s | on the disk after, s | share every{SHARES}")
    for row in rows:
        shares = " | ".join(f"{share} %" for share in row["share_percent"].values())
        print(f"{row['mode']} | {row['pause_s']} | {row['lost_s']} | {row['on_disk_s']} | {shares}")
    write_results(arguments.json, {"state_gb": round(gb, 2), "rows": rows})


if __name__ == "__main__":
    main()
