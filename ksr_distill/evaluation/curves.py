"""Reads a run's metrics.csv."""

import csv
from pathlib import Path


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return (update, value) pairs by metric.

    Raises:
        ValueError: If there is no such file, or it is no metrics.csv.
    """
    if not path.is_file():
        raise ValueError(f"curves={path} is no file; give a run's metrics.csv")
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"update", "metric", "value"} <= set(reader.fieldnames):
            raise ValueError(
                f"curves={path} has the columns {reader.fieldnames}; "
                "a run's metrics.csv has update, metric, value"
            )
        for row in reader:
            try:
                point = (float(row["update"]), float(row["value"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"curves={path}, line {reader.line_num}: {error}") from error
            curves.setdefault(row["metric"], []).append(point)
    return curves
