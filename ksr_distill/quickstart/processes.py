"""Run a command, and know what it and all its children took."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

SAMPLING_INTERVAL_S = 0.2
GIGABYTE = 1e9


class Usage(NamedTuple):
    """What a command took.

    Attributes:
        seconds: Wall time.
        peak_rss_gb: Largest sum of resident memory over this process and all below it, GB. Pages
            that processes share count once for each: an upper bound.
    """

    seconds: float
    peak_rss_gb: float


class CommandFailedError(RuntimeError):
    """A command of the quickstart ended with another exit code than 0."""

    def __init__(self, command: Sequence[str], returncode: int, usage: Usage) -> None:
        super().__init__(f"`{' '.join(command)}` ended with exit code {returncode}")
        self.usage = usage


def run_measured(command: Sequence[str]) -> Usage:
    """Run the command to its end, its output going where ours goes, and return what it took.

    Args:
        command: ``python`` and ``ksr`` mean those of this environment.

    Raises:
        CommandFailedError: If it ends with another exit code than 0.
    """
    begin, peak = time.monotonic(), 0.0
    with subprocess.Popen(_of_this_environment(command)) as process:
        while process.poll() is None:
            peak = max(peak, resident_gb_of_tree())
            try:
                process.wait(SAMPLING_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
    usage = Usage(time.monotonic() - begin, peak)
    if process.returncode != 0:
        raise CommandFailedError(command, process.returncode, usage)
    return usage


def resident_gb_of_tree() -> float:
    """Return the resident memory of this process and all its descendants, GB."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the listing and the look
            continue
    return total / GIGABYTE


def _of_this_environment(command: Sequence[str]) -> list[str]:
    program, *arguments = command
    if program == "python":
        return [sys.executable, *arguments]
    if program == "ksr":
        return [str(Path(sys.executable).with_name("ksr")), *arguments]
    return [program, *arguments]
