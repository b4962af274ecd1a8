"""The models to compare, from the keys of evaluate.yaml."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ksr_distill.evaluation.config import EvaluationConfig
from ksr_distill.evaluation.model_folders import read_index
from ksr_distill.evaluation.upscalers import ModelSpec

ToFolder = Callable[[Path], Path]
"""Turns a checkpoint into a model folder; a folder stays as it is."""

SPEC_KEYS = tuple(field.name for field in fields(ModelSpec))
# Where a run keeps what can be compared, the best of it first.
RUN_EXPORT, RUN_CHECKPOINT = "export", "checkpoints/best.ckpt"


def candidates(config: EvaluationConfig, to_folder: ToFolder) -> list[ModelSpec]:
    """Return what the keys model, models, sweep and teacher name.

    Raises:
        ValueError: If an entry has an unknown key, lacks one, or names no model.
    """
    specs = [] if config.model is None else [_from_path(config.model, to_folder)]
    specs += [_from_entry(entry, to_folder) for entry in config.models]
    if config.sweep is not None:
        specs += sweep_runs(config.sweep, to_folder)
    if config.teacher is not None:
        teacher = to_folder(config.teacher)
        specs += [
            ModelSpec(f"teacher_{steps}", teacher, "ddim", steps)
            for steps in config.teacher_num_inference_steps
        ]
    return specs


def sweep_runs(folder: Path, to_folder: ToFolder) -> list[ModelSpec]:
    """Return the runs of a sweep as student_1, student_2, …, by their number of steps.

    A run is a folder with `export/` or `checkpoints/best.ckpt`. Runs of equal steps keep their
    folder's name.

    Raises:
        ValueError: If there is no run.
    """
    if not folder.is_dir():
        raise ValueError(f"sweep={folder} is no folder; give the folder of a multirun's runs")
    runs = [
        run
        for run in sorted(folder.iterdir())
        if (run / RUN_EXPORT).is_dir() or (run / RUN_CHECKPOINT).is_file()
    ]
    if not runs:
        raise ValueError(
            f"sweep={folder} has no run with {RUN_EXPORT}/ or {RUN_CHECKPOINT}; "
            "give the folder of a multirun's runs"
        )
    found = []
    for run in runs:
        exported = run / RUN_EXPORT
        path = to_folder(exported if exported.is_dir() else run / RUN_CHECKPOINT)
        found.append((len(read_index(path).get("student_timesteps", ())), run.name, path))
    steps = [count for count, _, _ in found]
    return [
        ModelSpec(f"student_{count}" if steps.count(count) == 1 else name, path)
        for count, name, path in sorted(found)
    ]


def _from_path(path: str | Path, to_folder: ToFolder) -> ModelSpec:
    """Return an entry named after the run: outputs/ksr_flash/export is ksr_flash."""
    path = Path(path)
    parts = [part for part in path.resolve().parts if part not in (RUN_EXPORT, "checkpoints")]
    name = parts[-2] if path.is_file() else parts[-1]
    return ModelSpec(name, to_folder(path))


def _from_entry(entry: str | Mapping[str, Any], to_folder: ToFolder) -> ModelSpec:
    if isinstance(entry, str):
        return _from_path(entry, to_folder)
    unknown = [key for key in entry if key not in SPEC_KEYS]
    if unknown:
        raise ValueError(
            f"models has an entry with {unknown[0]}; allowed are {', '.join(SPEC_KEYS)}"
        )
    if "path" not in entry:
        raise ValueError(f"models has an entry without path: {dict(entry)}")
    named = _from_path(entry["path"], to_folder)
    return ModelSpec(**{"name": named.name, **entry, "path": named.path})


def check_names(config: EvaluationConfig, names: Sequence[str]) -> None:
    """Refuse a comparison with an unknown model, before anything runs.

    Raises:
        ValueError: By the config's key.
    """
    if not names:
        raise ValueError("nothing to compare; give model=FOLDER, or baselines=[bicubic]")
    for key, name in (("compare_with", config.compare_with), ("judged", config.judged)):
        if name is not None and name not in names:
            raise ValueError(f"{key}={name} is not among {', '.join(names)}")
