import json
import subprocess
import sys
from pathlib import Path

import pytest

from ksr_distill.quickstart import path

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            [],
            marks=pytest.mark.skipif(
                path.shipped_teacher() is None, reason="the package brings no teacher"
            ),
            id="shipped",
        ),
        pytest.param(["--train-teacher"], id="trained"),
    ],
)
def test_the_quickstart_keeps_its_promise(options, tmp_path):
    """Needs two idle cores: six minutes, 4 GB, and numbers on photos nothing was trained on."""
    for name in ("train.py", "evaluate.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "ksr_distill.quickstart", *options]
    subprocess.run(command, cwd=tmp_path, check=True)
    folder = tmp_path / "outputs" / "quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    bicubic, teacher, student = (metrics[name] for name in ("bicubic", "teacher", "student_4"))
    assert teacher["psnr_y"] >= bicubic["psnr_y"] + 1.0
    assert student["psnr_y"] >= bicubic["psnr_y"]
    distance = [abs(1 - one["top_octave_power_ratio"]) for one in (student, teacher)]
    assert distance[0] < distance[1]
    assert metrics["peak_rss_gb"] <= 4
    assert metrics["seconds"] <= 360
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
