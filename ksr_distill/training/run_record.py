"""What a run was started with, written into its folder without secrets."""

import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from ksr_distill.durable import replacing
from ksr_distill.training.checkpoints import completed_updates

log = logging.getLogger(__name__)

SECRET = re.compile(r"(^|[._-])(api_?key|key|token|secret|password|passwd|credentials?)$", re.I)
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "***"
PACKAGES = (
    "ksr-distill",
    "torch",
    "lightning",
    "diffusers",
    "numpy",
    "pillow",
    "webdataset",
    "wandb",
)


def scrub(value: Any, name: str = "") -> Any:
    """Return the same tree with secrets hidden, by the names of leaves, and users in URLs."""
    if isinstance(value, dict):
        return {k: scrub(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(v, name) for v in value]
    if value is not None and SECRET.search(name):
        return HIDDEN
    return USER_IN_URL.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def scrub_command(arguments: list[str]) -> list[str]:
    """Return a command line without the values of arguments that are named like secrets."""
    scrubbed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        scrubbed.append(name + equals + str(scrub(value, name)) if equals else scrub(argument))
    return scrubbed


def git_commit(folder: Path) -> str | None:
    """Return the commit of the code, marked when files differ from it; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def describe_machine() -> dict[str, Any]:
    """Return this host's name, platform, processors, memory and GPUs."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sizes_of_networks(pl_module: pl.LightningModule) -> list[str]:
    """Return the trained networks with their parameters."""
    networks: dict[str, nn.Module] = cast(Any, pl_module).trainable_networks()
    return [
        f"{name} ({sum(weight.numel() for weight in network.parameters()):,} parameters)"
        for name, network in networks.items()
    ]


class RunRecord(Callback):
    """Writes ``config.yaml``, and a line in ``starts.jsonl`` each time the run is started."""

    def __init__(self, folder: str | Path) -> None:
        """Make the callback.

        Args:
            folder: The run's folder.
        """
        self.folder = Path(folder)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, on the first rank, and give the config to the loggers."""
        if not trainer.is_global_zero:
            return
        config = scrub(cast(Any, pl_module).record.get("config", {}))
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_update": completed_updates(trainer),
            "command": scrub_command(sys.argv),
            "commit": git_commit(Path(__file__).parent),
            "num_processes": trainer.world_size,
            "num_nodes": trainer.num_nodes,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "machine": describe_machine(),
            "versions": package_versions(),
        }
        log.info("training %s", ", ".join(sizes_of_networks(pl_module)))
        try:
            self._write(config, start)
        except OSError as error:  # a full disk: the run is worth more than its record
            log.warning(
                "config.yaml and starts.jsonl in %s lack this start (%s); training goes on: free "
                "space",
                self.folder,
                error,
            )
        for logger in trainer.loggers:
            logger.log_hyperparams(config)

    def _write(self, config: dict[str, Any], start: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "config.yaml") as new:
            new.write_text(yaml.safe_dump(config, sort_keys=False))
        with (self.folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
