import sys

import pytest

from benchmarks.measuring import run_command


def held_mb(size_mb):
    return run_command([sys.executable, "-c", f"b'x' * ({size_mb} * 2**20)"]).peak_mb


def test_the_peak_of_a_command_is_its_own_and_not_that_of_who_measures_it():
    """This process has imported torch: some 500 MB, which a child's peak would begin with."""
    nothing = held_mb(0)
    assert nothing < 50
    assert 95 < held_mb(100) - nothing < 105


def test_a_command_that_fails_ends_the_benchmark_and_is_named(capfd):
    with pytest.raises(SystemExit):
        run_command([sys.executable, "-c", "raise SystemExit(3)"])
    assert "raise SystemExit(3) ended with 3" in capfd.readouterr().err


def test_the_clock_sees_a_sleep_and_the_processor_does_not():
    cost = run_command([sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert cost.seconds > 0.5 > cost.cpu_seconds
