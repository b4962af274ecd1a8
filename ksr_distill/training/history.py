"""metrics.csv, which a resumed run continues: rows of ``update,metric,value``."""

import csv
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

HEADER = ("update", "metric", "value")


class MetricsCSV(Logger):
    """Appends to ``metrics.csv``; Lightning's CSVLogger would delete the old rows at a resume.

    Args:
        folder: The run's folder; the file is created with the first value.
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._first_update: int | None = None  # rows from here on are this process's
        self._continues = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Fixed: the same command continues the same file."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's folder holds the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append the values of an update; a resumed run first drops rows from its update on."""
        if not metrics:
            return
        update = int(step or 0)
        try:
            self._append(metrics, update)
        except OSError as error:  # a full disk: the run is worth more than its curves
            log.warning(
                "the figures of update %d are not in %s (%s); training goes on: free space",
                update,
                self.path,
                error,
            )

    def _append(self, metrics: dict[str, float], update: int) -> None:
        if not self._continues:
            self._first_update = update if self._first_update is None else self._first_update
            self._drop_from(self._first_update)
            self._continues = True
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows((update, name, f"{value:.7g}") for name, value in metrics.items())

    def _drop_from(self, update: int) -> None:
        """Drop the rows from this update on: a killed run has logged beyond its last checkpoint."""
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", errors="replace") as file:
                # A crash may leave a row cut off, or zeros.
                text = (line for line in file if "\0" not in line)
                rows = [row for row in csv.reader(text) if len(row) == len(HEADER)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(r for r in rows if r[0].isdecimal() and int(r[0]) < update)
        temporary.replace(self.path)
