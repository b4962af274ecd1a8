"""Statistics: published values, hand-worked cases and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from ksr_distill.study.statistics import (
    A,
    B,
    alpha_interval,
    bootstrap_shares,
    expanded_percentiles,
    fair_coin_p_value,
    holm,
    krippendorff_alpha,
    rng_for,
    sign_flip_p_value,
    student_quantile,
    summarise,
)

# 28/15/19/37 % of 2100 votes, as whole votes that round to them.
ANNOUNCED = {"b": 597, "a": 322, "both": 404, "neither": 777}


def one_vote_each(a: int, b: int, both: int = 0, neither: int = 0) -> np.ndarray:
    outcome = np.repeat(np.arange(4), [a, b, both, neither])
    return np.eye(4, dtype=np.int64)[outcome]


def test_the_announcements_votes_give_its_difference_of_13_with_2_7_points():
    summary = summarise(one_vote_each(**ANNOUNCED), rng_for(0))
    assert [round(100 * share.estimate) for share in summary.shares] == [15, 28, 19, 37]
    low, high = 100 * summary.difference.low, 100 * summary.difference.high
    assert 100 * summary.difference.estimate == pytest.approx(13.0, abs=0.1)
    assert (high - low) / 2 == pytest.approx(2.7, abs=0.1)
    assert summary.p_value < 0.001


def test_one_category_of_the_announcement_decides_nothing():
    summary = summarise(one_vote_each(15, 28, 19, 38), rng_for(0))
    assert 100 * (summary.difference.high - summary.difference.low) / 2 == pytest.approx(
        12.6, abs=0.6
    )
    assert summary.p_value == pytest.approx(0.066, abs=0.01)  # sign test, 28 against 15


def test_votes_on_one_pair_are_not_taken_for_independent_ones():
    once = one_vote_each(30, 50, 10, 10)
    copied = summarise(5 * once, rng_for(0))
    assert copied.num_votes == 500
    assert copied.standard_error == pytest.approx(
        summarise(once, rng_for(0)).standard_error, rel=0.03
    )


def coverage(rng: np.random.Generator, num_studies: int, num_prompts: int, votes: int) -> float:
    """Plant a known effect with prompts of their own tastes; count how often it is covered."""
    truth = np.array([0.15, 0.28, 0.19, 0.38])
    covered = 0
    for _ in range(num_studies):
        tastes = rng.dirichlet(4 * truth, size=num_prompts)  # intra-pair correlation 1/5
        counts = rng.multinomial(votes, tastes)
        low, high = expanded_percentiles(bootstrap_shares(counts, rng, 600), num_prompts)
        covered += low[4] <= truth[B] - truth[A] <= high[4]
    return covered / num_studies


def test_a_planted_effect_is_covered_by_its_interval_at_the_nominal_rate():
    # 400 studies: 0.95 ± 0.033 at three standard errors.
    assert coverage(rng_for(1), 400, 100, 3) == pytest.approx(0.95, abs=0.033)


@pytest.mark.slow
@pytest.mark.parametrize(("num_prompts", "votes"), [(20, 3), (100, 1), (100, 3), (400, 5)])
def test_coverage_is_nominal_for_small_and_large_studies(num_prompts, votes):
    assert coverage(rng_for(2), 4000, num_prompts, votes) == pytest.approx(0.95, abs=0.013)


def test_no_effect_is_called_one_as_rarely_as_promised():
    rng = rng_for(3)
    tastes = [rng.dirichlet([0.8, 0.8, 0.8, 1.6], size=60) for _ in range(400)]
    # Symmetric: every prompt's taste or its mirror image.
    p_values = []
    for taste in tastes:
        mirrored = rng.integers(0, 2, 60).astype(bool)
        taste[mirrored] = taste[mirrored][:, [1, 0, 2, 3]]
        p_values.append(sign_flip_p_value(rng.multinomial(3, taste), rng, 500))
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.033)


def test_unanimous_votes_keep_an_interval_of_some_width():
    summary = summarise(one_vote_each(0, 100), rng_for(0))
    low, high = stats.binomtest(0, 100).proportion_ci(method="exact")
    assert summary.shares[A].low == low == 0.0
    assert summary.shares[A].high == pytest.approx(high)
    assert summary.shares[B].high == 1.0
    assert summary.shares[B].low == pytest.approx(1 - high)


def test_one_prompt_alone_decides_nothing():
    summary = summarise(np.array([[0, 9, 0, 0]]), rng_for(0))
    assert summary.difference.low == -1.0
    assert summary.difference.high == 1.0


def test_no_votes_are_an_error():
    with pytest.raises(ValueError, match="no votes"):
        summarise(np.zeros((3, 4), dtype=np.int64), rng_for(0))


def test_krippendorffs_own_example_gives_his_alpha():
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C: four observers, twelve
    # units, nominal, with missing data; 0 is missing.
    ratings = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
            [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
        ]
    )
    counts = np.stack([(ratings == value).sum(0) for value in range(1, 6)], axis=1)
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=0.0005)


def test_alpha_is_one_for_agreement_zero_for_chance_and_undefined_for_single_votes():
    assert krippendorff_alpha(np.array([[3, 0], [0, 3]])) == 1.0
    chance = np.random.default_rng(0).multinomial(3, [0.25] * 4, size=4000)
    interval = alpha_interval(chance, rng_for(0), 200)
    assert interval.low < 0 < interval.high
    assert math.isnan(krippendorff_alpha(one_vote_each(5, 5)))
    assert math.isnan(alpha_interval(np.array([[3, 0], [3, 0]]), rng_for(0)).estimate)


def test_holm_gives_the_textbook_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("heads", "flips"), [(0, 0), (5, 10), (8, 10), (3, 40), (540, 1000)])
def test_the_side_test_is_the_exact_binomial_one(heads, flips):
    expected = stats.binomtest(heads, flips).pvalue if flips else 1.0
    assert fair_coin_p_value(heads, flips) == pytest.approx(expected)


@pytest.mark.parametrize(("freedom", "tolerance"), [(4, 0.01), (9, 1e-3), (99, 1e-6)])
def test_students_quantile_is_close_enough(freedom, tolerance):
    assert student_quantile(0.975, freedom) == pytest.approx(
        stats.t.ppf(0.975, freedom), abs=tolerance
    )
