import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.cli import doctor as room


def run_doctor():
    return CliRunner().invoke(app, ["doctor"])


def test_a_sound_machine_is_found_sound():
    result = run_doctor()
    assert result.exit_code == 0, result.output
    for name in ("python", "torch", "pyvips", "lightning", "memory", "disk", "torchvision"):
        assert f"\nok     {name}" in "\n" + result.output


def test_one_line_each():
    findings = list(room.examine())
    assert len(run_doctor().output.splitlines()) == len(findings)
    assert all("\n" not in finding.text for finding in findings)


def install_broken_torchvision(folder, monkeypatch):
    (folder / "torchvision-0.28.0.dist-info").mkdir()
    (folder / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    (folder / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(str(folder))


def test_torchvision_beside_a_torch_that_it_was_not_built_for_is_named_with_the_remedy(
    tmp_path, monkeypatch
):
    install_broken_torchvision(tmp_path, monkeypatch)
    result = run_doctor()
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if "torchvision" in line)
    assert line.startswith("BROKEN")
    assert "nms does not exist" in line
    assert line.endswith("run: pip uninstall torchvision")


def test_a_missing_extra_is_no_fault_but_a_missing_base_package_is():
    assert not room.examine_package("no-such-package", "nothing", extra="train").is_broken
    assert room.examine_package("no-such-package", "nothing", extra=None).is_broken


def test_the_packages_of_pyproject_are_those_that_are_looked_at():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]

    def names(requirements):
        return {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}

    always_here = {"typer", "rich"}  # or ksr would not start
    base = {*room.BASE_PACKAGES, "pyvips"}
    assert names(project["dependencies"]) - always_here == base
    looked_at = {name for packages in room.EXTRA_PACKAGES.values() for name in packages}
    extras = [names(project["optional-dependencies"][extra]) for extra in room.EXTRA_PACKAGES]
    assert set().union(*extras) == looked_at


@pytest.mark.parametrize(("version", "is_broken"), [((3, 10), True), ((3, 13), False)])
def test_only_the_pythons_of_pyproject_pass(monkeypatch, version, is_broken):
    monkeypatch.setattr(sys, "version_info", (*version, 1, "final", 0))
    assert room.examine_python().is_broken is is_broken
