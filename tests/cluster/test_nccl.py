"""Two GPUs of one host over NCCL: trained, killed, told to go, continued; whole and in shards.

`pytest -m "gpu and not slow" tests/cluster/test_nccl.py --log-cli-level=INFO` tells what was
measured. Without the packages of the tests: `-o addopts= --import-mode=importlib`. A run is
made when a test first asks for it, so that `-k` saves the time of the others.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_run import ROOT, environment

from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.models import KSRUNet
from ksr_distill.training.checkpoint_io import read_checkpoint
from ksr_distill.training.checkpoints import last_good_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(500),
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 and "KSR_NCCL_ON_CPU" not in os.environ,
        reason="needs two CUDA devices; KSR_NCCL_ON_CPU=1 runs it on the CPU, over gloo",
    ),
]
log = logging.getLogger(__name__)
HERE = Path(__file__).parent
NUM_UPDATES, SAVED_AT, SIGNALLED_AT = 24, 12, 15
MINI = {
    "base_channels": 32, "stem_channels": 16, "channel_multipliers": [1, 2, 2],
    "num_blocks": [1, 2, 2], "time_embedding_dim": 64, "num_groups": 4, "predict_residual": True,
}  # fmt: skip
FULL = {"predict_residual": True}
EXACT = ("trainer.precision=32-true", "trainer.benchmark=false", "+trainer.deterministic=warn")


def make_files(folder: Path, model: dict[str, Any], side: int) -> Path:
    """Write shards of noise and a teacher of random weights."""
    (folder / "photos").mkdir(parents=True)
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / "photos" / f"{number}.png")
    options = PackOptions(0.0, (), 1, 0.0, None, 4)
    pack_folder(
        folder / "photos", folder / "shards", options, num_workers=0, on_progress=lambda *_: None
    )
    torch.manual_seed(0)
    unet = KSRUNet(**model)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    unet.save_pretrained(folder / "teacher" / "sr")
    return folder


class Run:
    """`torchrun --nproc-per-node 2 train.py …`, started."""

    def __init__(self, folder: Path, files: Path, *changes: str, signal_at: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.files = folder, files
        arguments = [
            "+experiment=ksr_flash_mini", f"hydra.run.dir={folder}/run",
            f"teacher={files}/teacher", f"data.shards={files}/shards/train-*.tar",
            f"num_updates={NUM_UPDATES}", "validate_every=1000", "log_every=4", "data.crop_px=64",
            "data.batch_size=8", "data.num_workers=0",
            "compile_networks=false", "cuda_graphs=false",
            "loss.game.critic_warmup_updates=2", "loss.game.late_timesteps_updates=0",
            "loss.game.backward_simulation_ramp=[0,8]", "trainer.val_check_interval=1.0",
            "callbacks.speed.count_flops=false", "+trainer.enable_progress_bar=false",
            "callbacks.stall.timeout_s=60",
            f"callbacks.checkpoint.every_updates={SAVED_AT}", "trainer.devices=2",
        ]  # fmt: skip
        if torch.cuda.device_count() < 2:
            arguments.append("trainer.accelerator=cpu")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.log = (folder / "log.txt").open("a")
        more = {"TELL": str(folder), "SIGNAL_AT": signal_at, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if EXACT[0] in changes:
            more["NVIDIA_TF32_OVERRIDE"] = "0"  # its rounding depends on the kernel that was chosen
        self.process = subprocess.Popen(
            [*torchrun, "--nproc-per-node=2", str(HERE / "watched.py"), str(ROOT / "train.py"),
             *arguments, *changes],
            cwd=folder, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(**more, PYTHONPATH=os.environ["PYTHONPATH"]),
        )  # fmt: skip

    def end(self, timeout: float = 100) -> "Run":
        try:
            self.code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutError(f"{self.folder.name} hangs\n{self.told()}") from None
        return self

    def told(self) -> str:
        return (self.folder / "log.txt").read_text()[-6000:]

    def ranks(self) -> list[dict[str, Any]]:
        assert self.code == 0, self.told()
        return [json.loads((self.folder / f"told.{rank}.json").read_text()) for rank in range(2)]

    def student(self) -> dict[str, torch.Tensor]:
        path = last_good_checkpoint(self.folder / "run" / "checkpoints")
        assert path is not None, self.told()
        state = read_checkpoint(path)["state_dict"]
        return {k: v.double() for k, v in state.items() if k.startswith("student.")}

    def moved_from(self, other: dict[str, torch.Tensor]) -> float:
        """Return how far the student's weights are from others, in L2."""
        return sum(float((v - other[k]).square().sum()) for k, v in self.student().items()) ** 0.5


def apart(one: Run, other: Run) -> float:
    """Return how far two students are from each other, in units of how far one has moved."""
    teacher = KSRUNet.from_pretrained(one.files / "teacher" / "sr").state_dict()
    start = {f"student.{name}": weight.double() for name, weight in teacher.items()}
    return one.moved_from(other.student()) / one.moved_from(start)


SHARDS = ("trainer=fsdp", *EXACT)
RUNS = {
    # name: what is changed, and which signal rank 1 gets in the middle
    "whole": (EXACT, None),
    "recorded": (("cuda_graphs=true", *EXACT), None),
    "killed": (EXACT, signal.SIGKILL),
    "killed, continued": (EXACT, None),
    "sharded": (SHARDS, None),
    "sharded, told": (SHARDS, signal.SIGUSR1),
    "sharded, told, continued": (SHARDS, None),
    "sharded, bf16": (("trainer=fsdp",), None),
}


class Runs(dict[str, Run]):
    """Runs by name, made when they are asked for.

    One after another: NCCL's kernels wait for each other, and programs take turns on a GPU.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.files = folder, make_files(folder / "files", MINI, 72)

    def __missing__(self, name: str) -> Run:
        changes, number = RUNS[name]
        begun = name.removesuffix(", continued")
        if begun != name:
            _ = self[begun]
        signal_at = "" if number is None else f"{SIGNALLED_AT}:1:{int(number)}"
        began = time.monotonic()
        here = self.folder / begun.replace(", ", "_")
        run = Run(here, self.files, *changes, signal_at=signal_at).end()
        log.info("%s: code %s after %.0f s", name, run.code, time.monotonic() - began)
        if (run.code == 0) != (number is None):
            pytest.fail(f"{name} ended with {run.code}\n{run.told()}")
        self[name] = run
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("nccl"))


@pytest.mark.parametrize("name", ["whole", "recorded", "sharded", "sharded, bf16"])
def test_all_ranks_end_with_the_same_weights(runs: Runs, name: str) -> None:
    first, second = runs[name].ranks()
    log.info("%s: %s", name, first)
    assert first["sha256"] == second["sha256"]


@pytest.mark.parametrize("name", ["killed", "sharded, told"])
def test_a_run_that_was_ended_continues_to_the_same_weights(runs: Runs, name: str) -> None:
    uninterrupted = runs["whole" if name == "killed" else "sharded"]
    share = apart(uninterrupted, runs[f"{name}, continued"])
    log.info("%s and continued: %.3g of the way from the uninterrupted run", name, share)
    assert share < 1e-3


def test_a_killed_run_goes_on_from_what_was_saved(runs: Runs) -> None:
    assert f"resuming student after update {SAVED_AT}" in runs["killed, continued"].told()


def test_a_run_that_was_told_goes_on_from_where_it_was(runs: Runs) -> None:
    told = runs["sharded, told, continued"].told()
    assert "the same command continues" in told
    assert f"resuming student after update {SIGNALLED_AT + 1}" in told


@pytest.mark.parametrize("name", ["recorded", "sharded"])
def test_every_way_trains_as_whole_networks_do(runs: Runs, name: str) -> None:
    share = apart(runs["whole"], runs[name])
    log.info("%s and whole: %.3g of the way apart", name, share)
    assert share < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_the_full_size_trains(
    strategy: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = tmp_path_factory.getbasetemp() / "full"
    if not files.exists():
        make_files(files, FULL, 288)
    run = Run(
        tmp_path, files, f"trainer={strategy}", "data.crop_px=256", "num_updates=12",
        "critic=teacher_features", "log_every=100", "callbacks.checkpoint.every_updates=100",
    ).end(300)  # fmt: skip
    first, second = run.ranks()
    assert first["sha256"] == second["sha256"]
    log.info("%s: %s", strategy, first)
