"""How long a start takes: ``ksr --help``, and ``import ksr_distill``.

python -m benchmarks.startup

Every start is a process of its own; the commands alternate, so that other load affects them alike.
Processor time hardly depends on that load; where the clock shows more, the machine was busy.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.measuring import RESULTS, Cost, run_command, write_results

KSR = shutil.which("ksr", path=Path(sys.executable).parent) or shutil.which("ksr")
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import ksr_distill": [sys.executable, "-c", "import ksr_distill"],
    "ksr --help": [KSR, "--help"]
    if KSR
    else [sys.executable, "-c", "from ksr_distill.cli import main; main()", "--help"],
}


def measure(starts: int) -> dict[str, list[Cost]]:
    """Return many starts of each command, after one that fills the page cache."""
    for command in COMMANDS.values():
        run_command(command)
    taken: dict[str, list[Cost]] = {name: [] for name in COMMANDS}
    for _ in range(starts):
        for name, command in COMMANDS.items():
            taken[name].append(run_command(command))
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--json", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args(arguments)
    taken = measure(options.starts)
    print("| start of | fastest, s | median, s | slowest, s | processor, s |")
    print("| --- | --- | --- | --- | --- |")
    medians = {}
    for name, starts in taken.items():
        seconds = [start.seconds for start in starts]
        cpu = statistics.median(start.cpu_seconds for start in starts)
        medians[name] = statistics.median(seconds)
        print(f"| {name} | {min(seconds):.3f} | {medians[name]:.3f} | {max(seconds):.3f} "
              f"| {cpu:.3f} |")  # fmt: skip
    bare = medians["python"]
    results = {
        "ksr_help_seconds": medians["ksr --help"],
        "import_seconds": medians["import ksr_distill"] - bare,
        "ksr_help_fastest_seconds": min(start.seconds for start in taken["ksr --help"]),
        "ksr_help_cpu_seconds": statistics.median(s.cpu_seconds for s in taken["ksr --help"]),
        "python_seconds": bare,
        "starts": options.starts,
    }
    write_results(options.json, {k: round(v, 4) for k, v in results.items()})


if __name__ == "__main__":
    main()
