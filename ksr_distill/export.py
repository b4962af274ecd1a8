"""Exports a checkpoint's averaged weights as a model folder with a model card."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ksr_distill import __version__
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders.conversion import write_original
from ksr_distill.inference.model_folders.files import new_folder, save_pipeline
from ksr_distill.inference.model_folders.loading import read_pipeline
from ksr_distill.models import KSRUNet, layout_of

CARD_CONFIG_GROUPS = ("data", "degradation", "diffusion", "loss", "optim", "critic")
FRONT_MATTER = """---
library_name: diffusers
pipeline_tag: image-to-image
license: apache-2.0
tags: [super-resolution, ksr_distill]
---
"""
"""The start of every model card, which the Hugging Face Hub reads."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a training checkpoint of ours; nothing in it is executed.

    Raises:
        ValueError: If the file is no checkpoint of `train.py`.
    """
    if not path.is_file():
        last = path.with_name("last.ckpt")
        there = f"there is {last}" if last.is_file() else "e.g. outputs/NAME/checkpoints/best.ckpt"
        raise ValueError(f"{path} is no file; give a checkpoint, {there}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for one mistake
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); give a file written "
            "by train.py, whole and without code in it"
        ) from error
    if not isinstance(checkpoint, dict) or "ksr" not in checkpoint:
        raise ValueError(
            f"{path} was not written by train.py; use `ksr convert` for released files"
        )
    return checkpoint


def averaged_unet(checkpoint: Mapping[str, Any]) -> KSRUNet:
    """Return the network to export: the EMA of the student, or of a trained teacher."""
    record = checkpoint["ksr"]
    prefix = f"{record['kind']}_ema."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    config = {k: v for k, v in record["model"].items() if not k.startswith("_")}
    unet = KSRUNet(**{**config, "dropout": 0.0})
    unet.load_state_dict(weights)
    return unet.eval()


def pipeline_of(checkpoint: Mapping[str, Any]) -> DiffusionPipeline:
    """Return the checkpoint's averaged network in the pipeline that samples it."""
    record = checkpoint["ksr"]
    unet = averaged_unet(checkpoint)
    if record["kind"] == "teacher":
        return KSRTeacherPipeline(sr=unet, scale=record["scale"])
    return KSRFlashPipeline(
        sr=unet, student_timesteps=record["student_timesteps"], scale=record["scale"]
    )


def export_checkpoint(
    path: Path, folder: Path, *, fp16: bool, self_contained: bool, overwrite: bool
) -> None:
    """Write a checkpoint's model folder, once the reloaded pipeline gives the same pixels.

    Args:
        fp16: Add the half-precision variant.
        self_contained: Add the code, so that diffusers loads the folder without this package.

    Raises:
        ValueError: If the file is no checkpoint, the folder exists, or its pixels differ.
    """
    checkpoint = read_checkpoint(path)
    with new_folder(folder, overwrite=overwrite) as scratch:
        pipeline = pipeline_of(checkpoint)
        save_pipeline(pipeline, scratch)
        check_same_pixels(pipeline, scratch)
        if fp16:
            save_pipeline(pipeline, scratch, with_half=True)
        if self_contained:
            from ksr_distill.inference.model_folders.self_contained import add_code  # noqa: PLC0415

            add_code(scratch)
        preview = latest_preview(path, checkpoint["ksr"]["update"])
        if preview is not None:
            shutil.copyfile(preview, scratch / "preview.png")
        (scratch / "README.md").write_text(model_card(checkpoint, path, preview), encoding="utf-8")


def export_original(path: Path, file: Path, *, overwrite: bool) -> None:
    """Write a checkpoint's averaged weights in the released code's format and names."""
    write_original(averaged_unet(read_checkpoint(path)), file, overwrite=overwrite)


def blend_students(
    first: Path, second: Path, folder: Path, *, share: float, overwrite: bool
) -> None:
    """Write the interpolation of two students' weights: (1 - share)·first + share·second.

    Both started from the same teacher, so weights between theirs work as well (network
    interpolation, arXiv:1809.00219, §3.4): a way to trade fidelity for detail without training.

    Args:
        first: A student's folder.
        second: Another's, of the same layout, timesteps and scale.
        share: Of the second, in [0, 1].

    Raises:
        ValueError: If the share is outside [0, 1], a folder holds no student, the two do not
            match, or the output folder exists.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--share {share} is outside 0…1, the part of {second}; use e.g. 0.5")
    one, other = (_student(path) for path in (first, second))
    mine, theirs = (_blendable(pipeline) for pipeline in (one, other))
    for key, value in mine.items():
        if theirs[key] != value:
            raise ValueError(
                f"{second} has {key}={theirs[key]}, {first} has {value}; blend two students of one "
                "teacher and of the same steps"
            )
    with torch.no_grad():
        for weight, their_weight in zip(one.sr.parameters(), other.sr.parameters(), strict=True):
            weight.lerp_(their_weight, share)
    with new_folder(folder, overwrite=overwrite) as scratch:
        save_pipeline(one, scratch)
        check_same_pixels(one, scratch)
        card = f"{FRONT_MATTER}\n{1 - share:g} of {first.name} and {share:g} of {second.name}.\n"
        (scratch / "README.md").write_text(card, encoding="utf-8")


def _student(folder: Path) -> KSRFlashPipeline:
    pipeline = read_pipeline(folder, torch.float32)
    if not isinstance(pipeline, KSRFlashPipeline):
        raise ValueError(f"{folder} holds a {type(pipeline).__name__}; give a student's folder")
    return pipeline


def _blendable(pipeline: KSRFlashPipeline) -> dict[str, Any]:
    """Return what two students must have in common."""
    layout = {f"model.{key}": value for key, value in layout_of(pipeline.sr).items()}
    settings = {key: pipeline.config[key] for key in ("student_timesteps", "scale")}
    return layout | settings


def check_same_pixels(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Compare the saved pipeline's pixels with the original's, on a picture of noise.

    Raises:
        ValueError: If a pixel differs.
    """
    generator = torch.Generator().manual_seed(0)
    lowres = torch.rand((1, 3, 32, 48), generator=generator)
    reloaded = type(pipeline).from_pretrained(folder)
    ours, theirs = (
        p(lowres, generator=torch.Generator().manual_seed(1), output_type="pt").images  # pyright: ignore[reportCallIssue]
        for p in (pipeline, reloaded)
    )
    if not torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)):
        raise ValueError(f"{folder} gives other pixels than the checkpoint; nothing was exported")


def latest_preview(checkpoint_path: Path, update: int) -> Path | None:
    """Return the run's last preview sheet up to this update."""
    folder = checkpoint_path.resolve().parent.parent / "previews"
    sheets = sorted(folder.glob("update_*.png"))
    fitting = [sheet for sheet in sheets if int(sheet.stem.removeprefix("update_")) <= update]
    return fitting[-1] if fitting else None


def validation_figures(
    record: Mapping[str, Any], path: Path
) -> tuple[Mapping[str, float], int | None]:
    """Return validation metrics and their update: those of these weights, else the last before.

    A checkpoint is saved before its update is validated; the manifest gets the metrics afterwards.
    """
    file = path.resolve()  # best.ckpt is a link; the manifest lies beside the file
    try:
        facts = json.loads(file.with_name(file.name + ".json").read_text())
        if facts["update"] == record["update"] and facts["metrics"]:
            return facts["metrics"], facts["update"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # copied without its manifest: use the checkpoint's own metrics
    update = record.get("validated_update")  # missing in older checkpoints
    return (record["metrics"], update) if update is not None else ({}, None)


def model_card(checkpoint: Mapping[str, Any], path: Path, preview: Path | None) -> str:
    """Return the folder's README: usage, validation metrics and training configuration."""
    record = checkpoint["ksr"]
    name = "KSRTeacherPipeline" if record["kind"] == "teacher" else "KSRFlashPipeline"
    steps = record.get("student_timesteps")
    what = f"{len(steps)}-step student, t = {steps}" if steps else "many-step teacher"
    config = record["config"]
    parts = {group: config[group] for group in CARD_CONFIG_GROUPS if config.get(group)}
    figures, validated = validation_figures(record, path)
    metrics = "\n".join(
        f"| {key.removeprefix('val/')} | {value:.4g} |" for key, value in figures.items()
    )
    held_out = config["data"].get("val_shards")
    none = "nothing was validated yet" if held_out else "the run had no validation pictures"
    when = "" if validated in (None, record["update"]) else f" after {validated} updates"
    picture = (
        "\n![lowres, what the network makes of it, original](preview.png)\n" if preview else ""
    )
    return f"""{FRONT_MATTER}
# {config["name"]}: ×{record["scale"]} super-resolution, {what}
{picture}
```python
from ksr_distill.inference import {name}
pipe = {name}.from_pretrained("FOLDER")
pipe(image).images[0].save("large.png")
```

Or `ksr upscale photo.jpg --model FOLDER`. Made by ksr_distill {__version__} from
`{path.name}` of run `{config["name"]}` after {record["update"]} updates; averaged (EMA) weights,
sha256 {weights_hash(checkpoint)}.

## How good
Validation pictures of the run (`{held_out}`), the averaged network{when}:

| metric | value |
| --- | --- |
{metrics or f"| none | {none} |"}

## How it was made
Data: `{config["data"].get("shards")}`. The whole configuration of the groups that matter:

```json
{json.dumps(parts, indent=2, ensure_ascii=False)}
```
"""


def weights_hash(checkpoint: Mapping[str, Any]) -> str:
    """Return the first 16 digits of the sha256 of the averaged weights, in key order."""
    digest = hashlib.sha256()
    prefix = f"{checkpoint['ksr']['kind']}_ema."
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    for name in sorted(name for name in state if name.startswith(prefix)):
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
