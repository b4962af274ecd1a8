"""Put a model folder into the package, in half precision and with its card.

    ksr export outputs/ksr_flash_mini/checkpoints/last.ckpt exports/ksr_flash_mini
    python -m benchmarks.ship_model exports/ksr_flash_mini mini_x2 --numbers student_4

benchmarks/shipped.json says how each was trained: what, data, commands, commit, note, by name.
The numbers of the card come from docs/results.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks.proof_page import COLUMNS
from ksr_distill.export import FRONT_MATTER
from ksr_distill.inference import KSRFlashPipeline, KSRTeacherPipeline
from ksr_distill.inference.model_folders import halve, new_folder

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "ksr_distill" / "assets"
LARGEST_BYTES = 16_000_000


def ship(source: Path, name: str, card: str) -> Path:
    """Write the package's model and return its folder.

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
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > LARGEST_BYTES:
            raise ValueError(f"{name} has {size} bytes, the package carries {LARGEST_BYTES}")
    check_halved(pipeline, target)
    return target


def check_halved(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Refuse a folder that does not load as float32 with the weights that were written."""
    loaded = type(pipeline).from_pretrained(folder)
    for name, value in pipeline.sr.state_dict().items():
        if not torch.equal(loaded.sr.state_dict()[name], value.float()):
            raise ValueError(f"{folder} reads back otherwise than it was written: {name}")


def card_of(name: str, numbers: str, facts: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the folder's README.

    Args:
        numbers: The models of results.json that are this folder, by the beginning of their names.
    """
    head = ["set", "sampling", *(title for _, title, _ in COLUMNS)]
    rows = [head, ["---"] * len(head)]
    for set_name, one in results["sets"].items():
        for model, values in one["models"].items():
            if model.startswith(numbers):
                cells = [f"{values[key]:.{digits}f}" for key, _, digits in COLUMNS]
                rows.append([set_name, f"{values['num_inference_steps']} steps", *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    commands = "\n".join(facts["commands"])
    return f"""{FRONT_MATTER}
# {name}: {facts["what"]}

`ksr upscale photo.jpg --model {name}`. float16 on the disk, averaged (EMA) weights.

**Data.** {facts["data"]}

**How.** Commit {facts["commit"]}; {facts["note"]}

```bash
{commands}
```

**How good** (docs/results.md says how it was measured)

{table}
"""


def main() -> None:
    """Ship one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made by ksr export")
    parser.add_argument("name", help="in the package")
    parser.add_argument("--numbers", required=True, help="its name in results.json, or a beginning")
    parser.add_argument("--facts", type=Path, default=ROOT / "benchmarks" / "shipped.json")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.json")
    options = parser.parse_args()
    facts = json.loads(options.facts.read_text(encoding="utf-8"))[options.name]
    results = json.loads(options.results.read_text(encoding="utf-8"))
    print(
        ship(options.folder, options.name, card_of(options.name, options.numbers, facts, results))
    )


if __name__ == "__main__":
    main()
