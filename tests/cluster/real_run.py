"""The real train.py on a tiny network and noise for photos, as a command line."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ksr_distill.data.packing import pack_folder
from ksr_distill.data.sources import PackOptions
from ksr_distill.models import KSRUNet

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
        val_fraction=0.0, val_patterns=(), min_side_px=1, min_sharpness=0.0, tile_px=None, shard_files=3
    )  # fmt: skip
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
