"""What README.md and CONTRIBUTING.md tell a reader to type exists, parses and composes."""

import ast
import re
import shlex
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from ksr_distill.cli import app
from ksr_distill.quickstart import path as quickstart

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
LAUNCHERS = {
    ("python", "train.py"): "train",
    ("python", "evaluate.py"): "evaluation/evaluate",
    ("torchrun", "--nproc-per-node", "8", "train.py"): "train",
    ("sbatch", "slurm/train.sbatch"): "train",
}


def blocks(language):
    """(page, text) of every fenced block of a language."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for label, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if label == language:
                yield page, block


def shell_commands():
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield tuple(words)


TEACHER = quickstart.TRAINED_TEACHER
QUICKSTART = {quickstart.pack(), *quickstart.train_teacher(), *quickstart.distil(TEACHER),
              quickstart.evaluate(TEACHER)}  # fmt: skip
COMMANDS = sorted(set(shell_commands()) | QUICKSTART)


def check_make(words):
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_pip(words):
    assert words[1] == "install"
    extras = re.findall(r"\[(.*?)\]", words[-1])
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ",".join(extras).split(",") if extras else ():
        assert extra in known["optional-dependencies"]


def check_ksr(words):
    """Every word up to the first argument is a command, and its help knows every option."""
    names = []
    for word in words[1:]:
        result = CliRunner().invoke(app, [*names, word, "--help"])
        if word.startswith("-") or result.exit_code != 0:
            break
        names.append(word)
        if "COMMAND" not in result.output:
            break
    assert names, f"{words[1]} is no command of ksr"
    text = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"}).output
    for option in (word.split("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"no {option}: {text}"


def check_hydra(config, overrides):
    folder, name = (ROOT / "conf" / config).parent, Path(config).name
    with initialize_config_dir(str(folder), version_base="1.3"):
        assert compose(name, list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_readers_are_told_to_type_exists_and_parses(words):
    for start, config in LAUNCHERS.items():
        if words[: len(start)] == start:
            assert all(
                (ROOT / word).is_file() for word in start if word.endswith((".py", ".sbatch"))
            )
            return check_hydra(config, words[len(start) :])
    checks = {"make": check_make, "pip": check_pip, "ksr": check_ksr}
    return checks[words[0]](words)


@pytest.mark.parametrize(("page", "block"), list(blocks("python")))
def test_python_in_the_readme_imports_what_exists(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(import_module(node.module), name.name), f"{page}: {name.name}"


def test_the_tree_shows_what_is_there():
    (tree,) = (block for _, block in blocks("") if block.startswith("train.py"))
    inside = ROOT
    for line in tree.splitlines():
        inside = ROOT / "ksr_distill" if line.startswith("  ") else ROOT
        for name in re.split(r" {2,}", line.strip())[0].split(", "):
            assert (inside / name).exists(), f"{name} is in the README's tree and nowhere else"
    rooms = {path.name for path in (ROOT / "ksr_distill").iterdir() if path.is_dir()}
    for room in rooms - {"__pycache__"}:
        assert f"  {room}/" in tree, f"the README's tree leaves out {room}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), f"{page} links to {target}"


def test_make_help_names_every_target_that_readers_are_told_to_make():
    text = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for words in COMMANDS:
        if words[0] == "make":
            assert f"make {words[1]} " in text
