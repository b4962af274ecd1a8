import os
import signal
import sys
import threading
import time

import pytest

from ksr_distill.quickstart.processes import (
    CommandFailedError,
    CommandInterruptedError,
    run_measured,
)

EAT = "import time; eaten = bytearray({megabytes}_000_000); time.sleep(0.6)"


def test_memory_of_a_grandchild_counts():
    inner = EAT.format(megabytes=300)
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    small = run_measured(["python", "-c", EAT.format(megabytes=1)])
    large = run_measured(["python", "-c", outer])
    assert large.peak_rss_gb - small.peak_rss_gb > 0.25


def test_wall_time_is_measured():
    assert 0.5 < run_measured(["python", "-c", "import time; time.sleep(0.5)"]).seconds < 3


def test_a_command_that_fails_stops_with_its_exit_code_and_what_it_took():
    with pytest.raises(CommandFailedError, match="exit code 3") as failure:
        run_measured(["python", "-c", "raise SystemExit(3)"])
    assert failure.value.usage.seconds > 0


def test_python_is_the_one_that_runs_us(capfd):
    run_measured(["python", "-c", "import sys; print(sys.executable)"])
    assert capfd.readouterr().out.strip() == sys.executable


def test_whoever_stops_us_stops_the_command_as_well(tmp_path):
    """Else a training would run on alone, beside the one that a second start makes."""
    alive = tmp_path / "alive"
    endless = (
        f"import pathlib, time\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    )
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CommandInterruptedError):
        run_measured(["python", "-c", endless])
    assert signal.getsignal(signal.SIGTERM) is before
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()
