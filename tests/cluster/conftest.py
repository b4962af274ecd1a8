"""The cluster tests' helpers lie beside them; the forked processes import them by name as well."""

import os
import sys
from pathlib import Path

import torch

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [HERE, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
)
torch.set_num_threads(1)
