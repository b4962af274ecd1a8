"""The keys of conf/evaluation/evaluate.yaml, which describes each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ksr_distill.config import check_whole_number

WHOLE_NUMBERS = {
    "scale": (1, False),
    "seed": (0, False),
    "crop_px": (16, False),
    "max_cards": (0, False),
    "num_images": (1, True),
    "border_px": (0, True),
}
"""By key, the smallest number that is allowed, and whether null is."""


@dataclass(frozen=True)
class EvaluationConfig:
    """One field for each key of evaluate.yaml; None is null."""

    model: Path | None
    models: Sequence[str | Mapping[str, Any]]
    sweep: Path | None
    teacher: Path | None
    teacher_num_inference_steps: Sequence[int]
    baselines: Sequence[str]
    benchmark: Path | None
    lowres: Path | None
    degradation: str | None
    scale: int
    num_images: int | None
    compare_with: str
    judged: str | None
    sort_by: str
    max_cards: int
    curves: Path | None
    title: str | None
    border_px: int | None
    crop_px: int
    lpips_weights: Path | None
    feature_weights: Path | None
    seed: int
    device: str | None
    half: bool
    output_dir: Path

    @classmethod
    def of(cls, composed: Mapping[str, Any]) -> "EvaluationConfig":
        """Return the config that Hydra composed, its numbers checked.

        Raises:
            ValueError: By the key.
        """
        for key, (smallest, may_be_null) in WHOLE_NUMBERS.items():
            check_whole_number(composed, key, at_least=smallest, may_be_null=may_be_null)
        values = {field.name: composed[field.name] for field in fields(cls)}
        for field in fields(cls):
            if field.type in (Path, Path | None) and values[field.name] is not None:
                values[field.name] = Path(values[field.name])
        return cls(**values)
