"""The commands, from two folders to a report."""

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.cli import study as cli_study
from ksr_distill.study.build import StudyPlan
from ksr_distill.study.planning import Assumptions
from ksr_distill.study.store import Store
from tests.study.studies import write_basket, write_picture


@pytest.fixture
def folders(tmp_path):
    write_basket(tmp_path / "basket.csv", [(f"p{index}", "a cat", "c") for index in range(3)])
    for index in range(3):
        write_picture(tmp_path / "before" / f"p{index}.png", (24, 16), index)
        write_picture(tmp_path / "after" / f"p{index}.png", (48, 32), index)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def build(folder, *options: object):
    sides = (folder / "before", folder / "after", "--prompts", folder / "basket.csv")
    return run("build", *sides, "-o", folder / "study", *options)


def test_build_says_what_can_be_decided_and_ends_with_the_path(folders):
    result = build(folders)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "3 pairs in 1 categories, 3 vote(s) per pair" in lines[0]
    assert any("no number of votes decides it" in line for line in lines)
    assert lines[-1] == str(folders / "study")


def test_the_options_have_the_defaults_of_the_plan(folders):
    build(folders, "--label-a", "A", "--label-b", "B")
    stored = {key: str(value) for key, value in StudyPlan()._asdict().items()}
    assert stored.items() <= Store(folders / "study").settings.items()
    defaults = inspect.signature(cli_study.build).parameters
    assert defaults["difference"].default == 100 * Assumptions().difference
    assert defaults["agreement"].default == Assumptions().agreement


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--difference", "0"), "impossible"),
        (("--votes-per-pair", "0"), "votes_per_pair=0 is too small"),
        (("--label-a", "x", "--label-b", "x"), "different labels"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(folders, options, message):
    result = build(folders, *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(folders.glob("study*"))


def test_a_report_before_the_first_vote_says_so(folders):
    build(folders)
    result = run("report", folders / "study")
    assert result.exit_code == 1
    assert "no votes to summarise" in result.stderr


def test_a_report_is_written_into_the_study(folders):
    build(folders, "--checks", 0)
    script = (
        "import sys; from pathlib import Path; from ksr_distill.study.store import Store\n"
        "store = Store(Path(sys.argv[1])); rater = store.add_rater('ann')\n"
        "while queue := store.queue(rater, 1):\n"
        "    store.vote(rater, f'{queue[0].pair.id:032x}', queue[0].pair.id, 'left', 2000)\n"
    )
    subprocess.run([sys.executable, "-c", script, folders / "study"], check=True)
    result = run("report", folders / "study")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(folders / "study" / "report" / "report.html")
    report = json.loads((folders / "study" / "report" / "report.json").read_text())
    assert report["overall"]["num_votes"] == 3
    assert report["labels"] == {"a": "before", "b": "after"}


def test_a_lost_secret_is_asked_back_instead_of_replaced(folders):
    build(folders)
    (folders / "study" / "secret").unlink()
    result = run("serve", folders / "study")
    assert result.exit_code == 1
    assert "bring the file back" in result.stderr
    assert not (folders / "study" / "secret").exists()


def test_building_serving_and_reporting_never_load_torch():
    rooms = "build, server, report, planning"
    script = f"import sys; from ksr_distill.study import {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
