"""The quickstart's commands, in order; the same ones work for photos of your own."""

from pathlib import Path

from PIL import Image

from ksr_distill.data.sample_photos import (
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    VALIDATION_PHOTOS,
    copy_sample_photos,
)
from ksr_distill.inference.model_folders.bundled import bundled_models

FOLDER = Path("outputs/quickstart")
PHOTOS = FOLDER / "photos"
HELD_OUT = FOLDER / "held_out"
SHARDS = FOLDER / "shards"
SHIPPED_TEACHER = "mini_x2_teacher"
# conf/experiment/quickstart_*.yaml name these two folders.
TEACHER = FOLDER / "teacher"
TRAINED_TEACHER = TEACHER / "export"
STUDENT = FOLDER / "student"
BEST, LAST = Path("checkpoints/best.ckpt"), Path("checkpoints/last.ckpt")
# A face of 224 px, so that ×4 takes seconds instead of a minute.
PHOTO = FOLDER / "chelsea.png"
PHOTO_SOURCE, PHOTO_BOX = HELD_OUT / "chelsea.png", (110, 30, 334, 254)
ENLARGED = {scale: FOLDER / f"chelsea_x{scale}.png" for scale in (2, 4)}
REPORT = FOLDER / "report.html"
METRICS = FOLDER / "metrics.json"
# The README's picture: fur and an eye.
COMPARISON = FOLDER / "comparison.png"
COMPARED_PHOTO, COMPARED_PLACE = "chelsea", (135, 55)
CURVES = FOLDER / "curves.csv"

DATA = (f"data.shards={SHARDS}/train-000000.tar", f"data.val_shards={SHARDS}/val-000000.tar")

Command = tuple[str, ...]


def copy_photos() -> None:
    """Copy the sample photos to where the commands expect them."""
    copy_sample_photos(TRAINING_PHOTOS, PHOTOS / "train")
    copy_sample_photos(VALIDATION_PHOTOS, PHOTOS / "validation")
    copy_sample_photos(HELD_OUT_PHOTOS, HELD_OUT)
    with Image.open(PHOTO_SOURCE) as image:
        image.crop(PHOTO_BOX).save(PHOTO)


def shipped_teacher() -> Path | None:
    """Return the folder of the shipped teacher, or None without one."""
    folder = bundled_models().get(SHIPPED_TEACHER)
    if folder is None:
        return None
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def in_words(teacher: Path) -> str:
    """Return a sentence that says which teacher was distilled."""
    if teacher == TRAINED_TEACHER:
        return "The student was distilled from a small teacher that was trained here."
    return f"The student was distilled from the teacher that comes with the package, {teacher}."


def pack() -> Command:
    """Return the command that makes shards of the photos."""
    return ("ksr", "shards", "pack", str(PHOTOS), str(SHARDS), "--val-match", "validation/*")


def train_teacher() -> list[Command]:
    """Return the commands that make TRAINED_TEACHER."""
    return [
        ("python", "train.py", "+experiment=quickstart_teacher", *DATA),
        ("ksr", "export", str(TEACHER / BEST), str(TRAINED_TEACHER), "--overwrite"),
    ]


def distil(teacher: Path) -> list[Command]:
    """Return the commands from a teacher to enlarged photos.

    Args:
        teacher: The folder to distil: the shipped one, or TRAINED_TEACHER.
    """
    # A teacher trained here needs a seventh of the shipped one's arithmetic, so there is time for
    # more updates.
    name = "quickstart_flash_tiny" if teacher == TRAINED_TEACHER else "quickstart_flash"
    return [
        ("python", "train.py", f"+experiment={name}", f"teacher={teacher}", *DATA),
        ("ksr", "export", str(STUDENT / LAST), str(STUDENT / "export"), "--overwrite"),
        *(upscale(scale) for scale in ENLARGED),
    ]


def upscale(scale: int) -> Command:
    """Return the command that enlarges a held-out photo beyond its own size."""
    options = f"-o {ENLARGED[scale]} --model {STUDENT / 'export'} --scale {scale}"
    return ("ksr", "upscale", str(PHOTO), *options.split())


def evaluate(teacher: Path) -> Command:
    """Return the command that measures teacher and student, and writes REPORT and METRICS."""
    return (
        "python", "evaluate.py", "+experiment=quickstart", f"teacher={teacher}", f"curves={CURVES}"
    )  # fmt: skip


def compared_pictures() -> list[tuple[str, Path]]:
    """Return label and file of what evaluate.py saved of one photo."""
    folder = FOLDER / "pictures" / COMPARED_PHOTO
    labels = {
        "bicubic": "bicubic",
        "teacher_1": "teacher, one step",
        "student_4": "student, four steps",
        "original": "original",
    }
    return [(label, folder / f"{model}.png") for model, label in labels.items()]
