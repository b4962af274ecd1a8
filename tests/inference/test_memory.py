import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_from_fourfold_to_sixteenfold(tmp_path):
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", "1", "--scales", "4", "16"]
    subprocess.run([*command, "--json", str(tmp_path / "memory.json")], cwd=ROOT, check=True)
    fourfold, sixteenfold = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert sixteenfold["width"] == 16384
    assert sixteenfold["peak_mb"] <= 1.2 * fourfold["peak_mb"]
