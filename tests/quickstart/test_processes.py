import sys

import pytest

from ksr_distill.quickstart.processes import CommandFailedError, run_measured

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
