"""Compare models and baselines: `python evaluate.py model=FOLDER benchmark=FOLDER …`.

Writes metrics.json, per_image.csv and report.html; conf/evaluation/evaluate.yaml lists the keys.
"""

import sys
from pathlib import Path
from typing import Any

import diffusers
import hydra
import typer
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ksr_distill.config import check_targets
from ksr_distill.degradation import Degradation
from ksr_distill.evaluation.command import evaluate
from ksr_distill.export import export_checkpoint
from ksr_distill.overrides import check_overrides, one_line

CONF = Path(__file__).resolve().parent / "conf"


def load_recipe(name: str, scale: int) -> Degradation:
    """Return the degradation that conf/degradation/NAME.yaml describes, at a scale."""
    path = CONF / "degradation" / f"{name}.yaml"
    if not path.is_file():
        allowed = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"degradation={name} is no recipe of conf/degradation; use {allowed}")
    tree = OmegaConf.create({"scale": scale, "degradation": OmegaConf.load(path)})
    config: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)  # type: ignore[assignment]
    check_targets(config)
    return instantiate(config["degradation"], _convert_="all")


@hydra.main(config_path="conf/evaluation", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Evaluate with the composed config; end with one line on a user's mistake."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]

    def to_folder(path: Path) -> Path:
        if not path.is_file():
            return path
        exported = Path(config["output_dir"], "exports", "-".join(path.resolve().parts[1:]))
        export_checkpoint(path, exported, fp16=False, self_contained=False, overwrite=True)
        return exported

    diffusers.utils.logging.disable_progress_bar()
    try:
        typer.echo(evaluate(config, to_folder=to_folder, load_recipe=load_recipe).resolve())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    try:
        check_overrides("evaluate", sys.argv[1:], CONF / "evaluation")
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()
