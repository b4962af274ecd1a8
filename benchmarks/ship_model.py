"""Puts model folders into the package, in half precision, and rewrites every model card.

    ksr export outputs/ksr_flash_mini/checkpoints/last.ckpt exports/flash_4
    python -m benchmarks.ship_model mini_x2=exports/flash_4
    python -m benchmarks.proof --students mini_x2 …    # measures what is shipped
    python -m benchmarks.ship_model                    # puts the numbers onto the cards

benchmarks/shipped.json describes each model and its training, and names its rows of
docs/results.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks.proof_page import COLUMNS, as_table, cells_of, how, in_words
from ksr_distill.export import FRONT_MATTER
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders.files import halve, new_folder

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "ksr_distill" / "assets"
FACTS = ROOT / "benchmarks" / "shipped.json"
RESULTS = ROOT / "docs" / "results.json"
LARGEST_BYTES = 16_000_000


def ship(source: Path, name: str) -> Path:
    """Write the package's model, without its card, and return its folder.

    Raises:
        ValueError: If it is larger than what the package carries.
    """
    classes = {cls.__name__: cls for cls in (KSRFlashPipeline, KSRTeacherPipeline)}
    index = json.loads((source / "model_index.json").read_text())
    pipeline: DiffusionPipeline = classes[index["_class_name"]].from_pretrained(source)
    halve(pipeline.sr)
    target = ASSETS / name
    with new_folder(target, overwrite=True) as folder:
        pipeline.save_pretrained(folder)
        forget_origin(folder)
        size = folder_bytes(folder)
        if size > LARGEST_BYTES:
            raise ValueError(f"{name} has {size} bytes, the package carries {LARGEST_BYTES}")
    check_halved(pipeline, target)
    return target


def forget_origin(folder: Path) -> None:
    """Take out of the configs where the model was loaded from: a path of another machine."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_halved(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Refuse a folder that does not load as float32 with the weights that were written."""
    loaded = type(pipeline).from_pretrained(folder)
    for name, value in pipeline.sr.state_dict().items():
        if not torch.equal(loaded.sr.state_dict()[name], value.float()):
            raise ValueError(f"{folder} reads back otherwise than it was written: {name}")


def card_of(name: str, facts: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the folder's README.

    Args:
        facts: Of benchmarks/shipped.json. ``section`` and ``numbers`` say which rows of the results
            are this folder's: a section, and how the names of its models begin.
        results: All sections.
    """
    commands = "\n".join(facts["commands"])
    return f"""{FRONT_MATTER}
# {name}: {facts["what"]}

`ksr upscale photo.jpg --model {name}`. float16 on the disk, averaged (EMA) weights.

## Data
{facts["data"]}

## How it was made
Commit {facts["commit"]}; {facts["note"]}

```bash
{commands}
```

## How good
{numbers_of(facts, results)}
"""


def numbers_of(facts: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the table of a card, or that nothing is measured yet."""
    if facts["section"] not in results:
        return "Not measured yet."
    head = ["set", "sampling", *(title for _, title, _ in COLUMNS)]
    rows = [head, ["---"] * len(head)]
    section = results[facts["section"]]
    for set_name, one in section["sets"].items():
        for model, values in one["models"].items():
            if model.startswith(facts["numbers"]):
                rows.append([set_name, in_words(model), *cells_of(values)])
    return f"{how(section)} The columns are explained in docs/results.md.\n\n{as_table(rows)}"


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    """Ship the models that are named, and write all cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="made by ksr export")
    options = parser.parse_args()
    facts, results = read_json(FACTS), read_json(RESULTS)
    for name, _, folder in (text.partition("=") for text in options.models):
        if name not in facts or facts[name]["commit"] is None:
            raise SystemExit(f"error: {FACTS.name} has no {name} with a commit; write it there")
        print(ship(Path(folder), name))
    for folder in sorted(index.parent for index in ASSETS.glob("*/model_index.json")):
        card = card_of(folder.name, facts[folder.name], results)
        (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
