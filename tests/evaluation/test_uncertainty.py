import numpy as np
import pytest

from ksr_distill.evaluation.uncertainty import bootstrap_interval


def test_the_interval_of_many_images_is_the_normal_one():
    values = np.random.default_rng(0).normal(30, 2, size=400)
    interval = bootstrap_interval(values, seed=0)
    half_width = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.02)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.exponential(size=40), seed=i) for i in range(200)]
    covered = sum(interval.low <= 1 <= interval.high for interval in intervals)
    assert 0.88 <= covered / 200 <= 0.99


def test_one_image_has_no_spread_and_the_seed_decides():
    assert bootstrap_interval(np.array([3.5]), seed=0) == (3.5, 3.5, 3.5)
    values = np.arange(9.0)
    assert bootstrap_interval(values, seed=2) == bootstrap_interval(values, seed=2)
