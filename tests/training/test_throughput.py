"""How long the device had nothing to do between two updates, by its own clock."""

import pytest
import torch

from ksr_distill.training.throughput import DeviceGaps


@pytest.fixture
def device(monkeypatch):
    """A device's clock, in milliseconds, which the test sets."""
    clock = {"ms": 0.0}

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock["ms"]

        def elapsed_time(self, later):
            return later.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return clock


def test_gaps_add_up_and_are_told_once(device):
    gaps = DeviceGaps()
    for begin, end in ((100, 150), (300, 325)):
        device["ms"] = begin
        gaps.begin()
        device["ms"] = end
        gaps.end()
    assert gaps.seconds() == pytest.approx(0.075)
    assert gaps.seconds() == 0


def test_what_comes_before_the_first_update_is_no_gap(device):
    gaps = DeviceGaps()
    device["ms"] = 5000
    gaps.end()
    assert gaps.seconds() == 0


def test_a_validation_between_two_updates_is_no_gap(device):
    gaps = DeviceGaps()
    gaps.begin()
    device["ms"] = 9000  # a validation; after it the gap begins anew
    gaps.begin()
    device["ms"] = 9010
    gaps.end()
    assert gaps.seconds() == pytest.approx(0.010)
