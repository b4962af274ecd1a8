"""The commands of the quickstart, in order: what a reader would type for photos of their own."""

from pathlib import Path

from ksr_distill.data.sample_photos import (
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    VALIDATION_PHOTOS,
    copy_sample_photos,
)

FOLDER = Path("outputs/quickstart")
PHOTOS = FOLDER / "photos"
HELD_OUT = FOLDER / "held_out"
SHARDS = FOLDER / "shards"
# conf/experiment/quickstart_{teacher,flash}.yaml name these two folders.
TEACHER = FOLDER / "teacher"
STUDENT = FOLDER / "student"
BEST = Path("checkpoints/best.ckpt")
ENLARGED_PHOTO = "coffee"
BENCHMARK = FOLDER / "benchmark"

Command = tuple[str, ...]


def copy_photos() -> None:
    """Copy the sample photos to where the commands expect them."""
    copy_sample_photos(TRAINING_PHOTOS, PHOTOS / "train")
    copy_sample_photos(VALIDATION_PHOTOS, PHOTOS / "validation")
    copy_sample_photos(HELD_OUT_PHOTOS, HELD_OUT)


def commands() -> list[Command]:
    """Return every command; each needs the ones before it."""
    data = (
        f"data.shards={SHARDS}/train-000000.tar",
        f"data.val_shards={SHARDS}/val-000000.tar",
    )
    return [
        ("ksr", "shards", "pack", str(PHOTOS), str(SHARDS), "--val-match", "validation/*"),
        ("python", "train.py", "+experiment=quickstart_teacher", *data),
        ("ksr", "export", str(TEACHER / BEST), str(TEACHER / "export")),
        ("python", "train.py", "+experiment=quickstart_flash", *data),
        ("ksr", "export", str(STUDENT / BEST), str(STUDENT / "export")),
        upscale(2),
        upscale(4),
        ("python", "evaluate.py", "+experiment=quickstart"),
    ]


def upscale(scale: int) -> Command:
    """Return the command that enlarges a held-out photo beyond its own size."""
    photo = HELD_OUT / f"{ENLARGED_PHOTO}.png"
    out = FOLDER / f"{ENLARGED_PHOTO}_x{scale}.png"
    model = STUDENT / "export"
    return ("ksr", "upscale", *f"{photo} -o {out} --model {model} --scale {scale}".split())
