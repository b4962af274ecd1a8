"""Runs a command, and measures the time and memory of it and all its children."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil

SAMPLING_INTERVAL_S = 0.2
GIGABYTE = 1e9


class Usage(NamedTuple):
    """A command's time and memory.

    Attributes:
        seconds: Wall time.
        peak_rss_gb: Largest sum of resident memory over this process and its descendants, GB; an
            upper bound, since shared pages count once for each process.
    """

    seconds: float
    peak_rss_gb: float


class CommandFailedError(RuntimeError):
    """A command of the quickstart ended with a nonzero exit code."""

    def __init__(self, command: Sequence[str], returncode: int, usage: Usage) -> None:
        super().__init__(f"`{' '.join(command)}` ended with exit code {returncode}")
        self.usage = usage


class CommandInterruptedError(RuntimeError):
    """This process and the command were interrupted; the command has ended."""

    def __init__(self, usage: Usage) -> None:
        super().__init__("interrupted")
        self.usage = usage


def run_measured(command: Sequence[str]) -> Usage:
    """Run the command to its end, with inherited output, and return its time and memory.

    Args:
        command: ``python`` and ``ksr`` are those of this environment.

    Raises:
        CommandFailedError: If it ends with another exit code than 0.
        CommandInterruptedError: If the user interrupts.
    """
    begin, peak = time.monotonic(), 0.0
    with (
        subprocess.Popen(_of_this_environment(command)) as process,
        forward_signals(process) as signals,
    ):
        while process.poll() is None:
            peak = max(peak, resident_gb_of_tree())
            try:
                process.wait(SAMPLING_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
    usage = Usage(time.monotonic() - begin, peak)
    if signals:
        raise CommandInterruptedError(usage)
    if process.returncode != 0:
        raise CommandFailedError(command, process.returncode, usage)
    return usage


@contextmanager
def forward_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, and forward SIGTERM to the command.

    A terminal sends Ctrl-C to the command as well.
    """
    signals: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def resident_gb_of_tree() -> float:
    """Return the resident memory of this process and all its descendants, GB."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it has ended since it was listed
            continue
    return total / GIGABYTE


def _of_this_environment(command: Sequence[str]) -> list[str]:
    program, *arguments = command
    if program == "python":
        return [sys.executable, *arguments]
    if program == "ksr":
        return [str(Path(sys.executable).with_name("ksr")), *arguments]
    return [program, *arguments]
