"""Sweeps: the points of conf/sweep for a job array, and a summary table of their runs.

`python -m ksr_distill.training.sweeps point 2 +sweep=student_timesteps …` prints the overrides of
one point; `python -m ksr_distill.training.sweeps summary FOLDER` writes the table.
"""

import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[2] / "conf"
OUTCOME = "outcome.json"
RUN_FOLDER = "hydra.run.dir=${hydra.sweep.dir}/${hydra.sweep.subdir}"


def sweep_points(name: str, folder: Path = CONF) -> list[list[str]]:
    """Return the overrides of every point of conf/sweep/NAME.yaml, in Hydra's order.

    Raises:
        ValueError: If there is no such sweep; it names those that there are.
    """
    path = folder / "sweep" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"+sweep={name}: there is no {path.name} in conf/sweep; use {known}")
    params: dict[str, Any] = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    choices = [
        [f"{key}={value.strip()}" for value in str(values).split(",")]
        for key, values in params.items()
    ]
    return [list(point) for point in itertools.product(*choices)]


def point_overrides(index: int, arguments: Sequence[str]) -> list[str]:
    """Return the overrides that turn a sweep's command line into one of its runs.

    Raises:
        ValueError: If the command has no +sweep=, the sweep fewer points, or the command others.
    """
    names = [a.removeprefix("+sweep=") for a in arguments if a.startswith("+sweep=")]
    if len(names) != 1:
        raise ValueError("the command needs one +sweep=NAME, such as +sweep=student_timesteps")
    points = sweep_points(names[0])
    swept = {point.partition("=")[0] for point in points[0]}
    for argument in arguments:
        if argument.startswith("hydra.sweeper") or argument.partition("=")[0] in swept:
            raise ValueError(
                f"{argument}: the points of a job array are those of conf/sweep/{names[0]}.yaml; "
                "copy it under another name, change it there, and give +sweep=THAT"
            )
    if not 0 <= index < len(points):
        raise ValueError(
            f"there is no point {index} in +sweep={names[0]}, which has {len(points)}; submit with "
            f"--array=0-{len(points) - 1}"
        )
    return ["hydra.mode=RUN", RUN_FOLDER, *points[index]]


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of a sweep's runs."""
    for path in sorted(folder.iterdir()):
        if (path / ".hydra" / "overrides.yaml").is_file():
            yield path


def readable(manifest: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest; one that is damaged is named and left out of the table."""
    try:
        return json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s: %s; left out of the summary", manifest, error)
        return None


def row_of_run(folder: Path) -> dict[str, str]:
    """Return a run's row of the table: its state, its metrics, and its error if it failed."""
    row = {"run": folder.name}
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
    manifests = sorted((folder / "checkpoints").glob("update-*.ckpt.json"))
    facts = [fact for path in manifests if (fact := readable(path))]
    done = max((fact["update"] for fact in facts), default=0)
    row["state"] = "finished" if done >= config["num_updates"] else "not finished"
    row["updates"] = f"{done} of {config['num_updates']}"
    for fact in facts:
        judged = {k: v for k, v in fact["metrics"].items() if k.count("/") == 1}  # no teacher's
        row |= {name: f"{value:.4g} at {fact['update']}" for name, value in judged.items()}
    if (folder / OUTCOME).exists() and row["state"] != "finished":
        row["error"] = json.loads((folder / OUTCOME).read_text())["error"]
    return row


def write_summary(folder: Path) -> Path:
    """Write ``summary.md``, one line for each run, and return its path."""
    rows = [row_of_run(path) for path in run_folders(folder)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in rows]
    path = folder / "summary.md"
    temporary = path.with_name(f".summary.{os.getpid()}.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)
    return path


class SweepSummary(Callback):
    """Hydra callback that notes how each run ended, and keeps the table up to date."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Forget an earlier end: the run is tried again."""
        if is_first_process():
            (Path(config.hydra.runtime.output_dir) / OUTCOME).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Note a failure, and rewrite the table: a job array has no process that ends last."""
        if not is_first_process():
            return
        run = Path(config.hydra.runtime.output_dir)
        if job_return.status == JobStatus.FAILED:
            error = " ".join(str(job_return._return_value).split())
            (run / OUTCOME).write_text(json.dumps({"error": error}))
            log.error("%s failed: %s", run.name, error)
        log.info("sweep so far: %s", write_summary(run.parent))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Show the table."""
        path = write_summary(Path(config.hydra.sweep.dir))
        log.info("%s\n%s", path, path.read_text())


def is_first_process() -> bool:
    """Return whether this is rank 0 as far as torchrun and srun say."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def main(arguments: Sequence[str]) -> None:
    """Print one point's overrides, or write a sweep's table."""
    command, *rest = arguments or [""]
    if command == "point" and rest and rest[0].isdigit():
        sys.stdout.write("\n".join(point_overrides(int(rest[0]), rest[1:])) + "\n")
    elif command == "summary" and len(rest) == 1:
        sys.stdout.write(write_summary(Path(rest[0])).read_text())
    else:
        raise ValueError("use `point NUMBER +sweep=NAME …`, or `summary FOLDER`")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
