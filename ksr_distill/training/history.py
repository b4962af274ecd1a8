"""metrics.csv, which a resumed run continues: rows of ``update,metric,value``."""

import csv
import logging
from collections.abc import Container
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
        """Append the values of an update; a resumed run first drops what it logs again."""
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
        if self._first_update is None:
            self._first_update = update
        if not self._continues or update == self._first_update:
            self._drop_from(self._first_update, names=metrics)
            self._continues = True
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows((update, name, f"{value:.7g}") for name, value in metrics.items())

    def _drop_from(self, update: int, *, names: Container[str]) -> None:
        """Drop the rows after this update, and its own of these names.

        A killed run has logged beyond its last checkpoint. Of the update itself other rows stay:
        where only its validation is made up for, its losses are not logged again.
        """
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", errors="replace") as file:
                # A crash may leave a row cut off, or zeros.
                text = (line for line in file if "\0" not in line)
                rows = [row for row in csv.reader(text) if len(row) == len(HEADER)]
        kept = [
            row
            for row in rows
            if row[0].isdecimal()
            and (int(row[0]) < update or (int(row[0]) == update and row[1] not in names))
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(kept)
        temporary.replace(self.path)
