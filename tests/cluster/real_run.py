"""The real train.py on a tiny network and noise for photos, as a command line."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from ksr_distill.data.loading import HiresBatch
from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.models import KSRUNet
from ksr_distill.training import checkpoint_io
from ksr_distill.training.checkpoint_io import read_checkpoint
from ksr_distill.training.datamodule import HiresDataModule
from ksr_distill.training.distillation import DistillationModule

ROOT = Path(__file__).parents[2]
TINY_UNET = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_blocks": [1, 1],
    "time_embedding_dim": 16,
    "num_groups": 4,
}
NUM_PHOTOS = 10


def make_shards(folder: Path, num_photos: int = NUM_PHOTOS) -> Path:
    """Write photos and pack them, 3 a shard; return the folder of shards."""
    photos, shards = folder / "photos", folder / "shards"
    photos.mkdir(parents=True)
    for number in range(num_photos):
        values = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(values).save(photos / f"{number}.png")
    options = PackOptions(
        val_fraction=0.0,
        val_patterns=(),
        min_side_px=1,
        min_sharpness=0.0,
        tile_px=None,
        shard_files=3,
    )
    pack_folder(photos, shards, options, num_workers=0, on_progress=lambda *_: None)
    return shards


def make_teacher(folder: Path) -> Path:
    """Save a teacher of random weights, as `ksr export` would."""
    torch.manual_seed(0)
    KSRUNet(**TINY_UNET).save_pretrained(folder / "teacher" / "sr")
    return folder / "teacher"


def overrides(folder: Path, *, num_updates: int = 6) -> list[str]:
    """Return the arguments of a distillation that takes a second."""
    return [
        "+experiment=quickstart_flash",
        "name=run",
        f"teacher={folder / 'teacher'}",
        f"data.shards={folder}/shards/train-*.tar",
        f"num_updates={num_updates}",
        "validate_every=1000",
        "log_every=2",
        "data.crop_px=32",
        "data.batch_size=4",
        "data.num_workers=0",
        "critic.head_channels=8",
        "loss.game.critic_warmup_updates=1",
        "loss.game.late_timesteps_updates=0",
        "loss.game.backward_simulation_ramp=[0,4]",
        "trainer.val_check_interval=1.0",
        "+trainer.enable_progress_bar=false",
        "+trainer.enable_model_summary=false",
    ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a launcher left in it."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HYDRA_FULL_ERROR": "1"}
    return {**mine, **quiet, "PYTHONPATH": str(ROOT), **more}


def run_train(
    folder: Path,
    *,
    files: Path,
    changes: tuple[str, ...] = (),
    die: tuple[int, str] | None = None,
    num_updates: int = 6,
    attempt: int = 0,
) -> None:
    """Train as `python train.py` does, in a process that has imported it; or die on the way.

    What each rank consumes is noted: (update, positions in the plan).

    Args:
        files: Where shards and teacher lie.
        attempt: Counts the restarts; a later attempt's reading of an update is the one that counts.
        die: After how many updates, and where ("turn": between the turns, "save": while saving).
    """
    import train  # noqa: PLC0415, the script: pytest's own process need not import it

    rank = os.environ["RANK"]
    note_what_is_consumed(folder / f"consumed.{attempt:03d}.{rank}.jsonl")
    if die is not None:
        die_in_the_middle(*die)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        texts = [
            *overrides(files, num_updates=num_updates),
            f"run_dir={folder}/run",
            f"trainer.devices={os.environ['LOCAL_WORLD_SIZE']}",
            *changes,
        ]
        config = compose("train", texts)
    train.train(OmegaConf.to_container(config, resolve=True), is_sweep=False)


def note_what_is_consumed(path: Path) -> None:
    degrade = HiresDataModule.on_after_batch_transfer

    def noting(self: HiresDataModule, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, HiresBatch):
            with path.open("a") as file:
                file.write(json.dumps([batch.update, batch.positions.tolist()]) + "\n")
        return degrade(self, batch, dataloader_idx)

    HiresDataModule.on_after_batch_transfer = noting


def die_in_the_middle(update: int, place: str) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "turn":
        student_turn = DistillationModule.student_turn

        def turn(self: DistillationModule, *arguments: Any) -> Any:
            return die() if self.update == update else student_turn(self, *arguments)

        DistillationModule.student_turn = turn
        return
    flush = checkpoint_io.flush_to_disk

    def flushing(path: Path) -> None:
        return die() if f"{update:09d}" in path.name else flush(path)

    checkpoint_io.flush_to_disk = flushing


def digest_of_run(folder: Path) -> str:
    """Return a checksum of the weights, the average, the optimisers and the counters at the end."""
    checkpoint = read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    sha = hashlib.sha256()

    def add(tree: Any) -> None:
        if isinstance(tree, torch.Tensor):
            sha.update(tree.contiguous().numpy().tobytes())
        elif isinstance(tree, dict):
            for key in sorted(tree, key=str):
                sha.update(str(key).encode())
                add(tree[key])
        elif isinstance(tree, list | tuple):
            for item in tree:
                add(item)
        else:
            sha.update(repr(tree).encode())

    told = checkpoint["ksr"]
    add([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    add([told["update"], told["network_updates"]])
    return sha.hexdigest()


def consumed(folder: Path) -> dict[int, list[int]]:
    """Return the positions that each update saw in the attempt that counts: its last."""
    counted: dict[int, tuple[str, list[int]]] = {}
    for path in sorted(folder.glob("consumed.*.jsonl")):
        attempt = path.name.split(".")[1]
        for line in path.read_text().splitlines():
            update, positions = json.loads(line)
            earlier, seen = counted.get(update, (attempt, []))
            counted[update] = (attempt, positions + (seen if earlier == attempt else []))
    return {update: sorted(positions) for update, (_, positions) in counted.items()}
