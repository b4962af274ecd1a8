"""Run a command to its end and print its seconds, its processor seconds and its peak memory in MB.

    python benchmarks/starter.py COMMAND ...

A small process of its own: Linux counts the peak memory of the starting process as that of the
started one, so that nothing below the starter's own 12 MB can be measured.
"""

import os
import subprocess
import sys
import time


def main(command: list[str]) -> None:
    """Run the command and discard its output; exit with an error if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    print(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main(sys.argv[1:])
