"""The golden vectors of tests/fixtures/golden, and the weights that they were recorded with."""

import json
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN_FOLDER = Path(__file__).parent / "fixtures" / "golden"


def golden_shapes(name: str) -> dict[str, list[int]]:
    """Return every released parameter name and shape, e.g. of ``sr_unet_full_state_dict``.

    Args:
        name: A JSON file of the golden folder without its ending: ``tiny_state_dicts/movq``.
    """
    return json.loads((GOLDEN_FOLDER / f"{name}.json").read_text())


def golden_weights(
    state_dict_json: Path | dict[str, list[int]], seed: int = 2
) -> dict[str, Tensor]:
    """Return the released-layout weights of GOLDEN.md's recipe, in float32.

    Args:
        state_dict_json: Original names and shapes, or the JSON file that holds them.
        seed: The golden files were recorded with 2, see their metadata.
    """
    if isinstance(state_dict_json, Path):
        state_dict_json = json.loads(state_dict_json.read_text())
    return {name: _value(name, shape, seed) for name, shape in state_dict_json.items()}


def load_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Return a golden file's tensors and its metadata with ``config`` parsed and ``seed`` an int.

    Args:
        name: A safetensors file of the golden folder without its ending: ``sr_unet``.
    """
    with safe_open(GOLDEN_FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata["config"] = json.loads(metadata["config"])
    metadata["seed"] = int(metadata["seed"])
    return tensors, metadata


def _value(name: str, shape: list[int], seed: int) -> Tensor:
    draw = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    n = torch.from_numpy(draw.standard_normal(shape).astype(np.float32))
    if len(shape) > 1:
        return 0.5 * n / prod(shape[1:]) ** 0.5
    return 0.1 * n if name.endswith("bias") else 1 + 0.1 * n
