"""Records the commands, so that an interrupted quickstart continues and its times are summed."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ksr_distill.durable import replace_file
from ksr_distill.quickstart.processes import Usage


@dataclass
class Entry:
    """One command of the quickstart.

    Attributes:
        command: As it was echoed.
        seconds: Wall time, interrupted attempts included.
        peak_rss_gb: The largest of its attempts.
        is_done: Whether it ended with exit code 0.
    """

    command: list[str]
    seconds: float = 0.0
    peak_rss_gb: float = 0.0
    is_done: bool = False


class Ledger:
    """The commands that were run, saved after each.

    Args:
        path: A JSON file; an existing one is continued.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        if path.exists():
            self.entries = [Entry(**entry) for entry in json.loads(path.read_text())]

    def is_done(self, command: Sequence[str]) -> bool:
        """Return whether this command has succeeded before."""
        return any(entry.is_done and entry.command == list(command) for entry in self.entries)

    def add(self, command: Sequence[str], usage: Usage, *, is_done: bool) -> None:
        """Record an attempt's time and memory."""
        entry = next((e for e in self.entries if e.command == list(command)), None)
        if entry is None:
            entry = Entry(list(command))
            self.entries.append(entry)
        entry.seconds += usage.seconds
        entry.peak_rss_gb = max(entry.peak_rss_gb, usage.peak_rss_gb)
        entry.is_done = entry.is_done or is_done
        self._save()

    @property
    def seconds(self) -> float:
        """Wall time of all commands."""
        return math.fsum(entry.seconds for entry in self.entries)

    @property
    def peak_rss_gb(self) -> float:
        """Largest resident memory of all commands."""
        return max((entry.peak_rss_gb for entry in self.entries), default=0.0)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(entry) for entry in self.entries], indent=2) + "\n"
        replace_file(self.path, text.encode())
