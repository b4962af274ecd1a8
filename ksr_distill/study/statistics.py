"""Statistics of the votes; all resample prompts, because votes on one pair are not independent.

A table of counts has one row for each prompt and the columns of ``OUTCOMES``.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

OUTCOMES = ("a", "b", "both", "neither")
A, B, BOTH, NEITHER = range(4)
LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
NUM_REPLICATES = 40_000  # so that an interval moves by less than one percent of its width

Counts = Int[np.ndarray, "prompts 4"]


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float


class Summary(NamedTuple):
    """The results of one group of prompts.

    Attributes:
        shares: One interval for each of ``OUTCOMES``.
        difference: Share that prefers B minus share that prefers A.
        standard_error: Of the difference, over prompts.
        p_value: Two-sided, of no difference.
    """

    num_prompts: int
    num_votes: int
    shares: tuple[Interval, Interval, Interval, Interval]
    difference: Interval
    standard_error: float
    p_value: float


def rng_for(*entropy: int) -> np.random.Generator:
    """Return a NumPy generator seeded with these integers (randomness.py has torch's)."""
    return np.random.default_rng(list(entropy))


def summarise(counts: Counts, rng: np.random.Generator) -> Summary:
    """Return shares, difference and p-value with bootstrap intervals over prompts.

    Args:
        counts: Prompts without a vote are left out.

    Raises:
        ValueError: There is no vote.
    """
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        raise ValueError("no votes to summarise; collect some with ksr study serve")
    totals = counts.sum(0)
    shares = totals / totals.sum()
    estimates = np.append(shares, shares[B] - shares[A])
    replicates = bootstrap_shares(counts, rng)
    low, high = expanded_percentiles(replicates, len(counts))
    low, high = _open_degenerate(estimates, low, high, len(counts))
    intervals = [Interval(*map(float, row)) for row in zip(estimates, low, high, strict=True)]
    return Summary(
        num_prompts=len(counts),
        num_votes=int(totals.sum()),
        shares=(intervals[0], intervals[1], intervals[2], intervals[3]),
        difference=intervals[4],
        standard_error=float(replicates[:, 4].std()),
        p_value=sign_flip_p_value(counts, rng),
    )


def bootstrap_shares(
    counts: Counts, rng: np.random.Generator, num_replicates: int = NUM_REPLICATES
) -> Float[np.ndarray, "replicates 5"]:
    """Return shares of the outcomes, and B minus A, in prompts resampled with replacement."""
    # Prompts with equal counts are interchangeable: draw how many of each kind, not which.
    kinds, sizes = np.unique(counts, axis=0, return_counts=True)
    replicates = np.empty((num_replicates, 5))
    block = 1 + 2_000_000 // len(kinds)  # about 16 MB of draws at once
    for start in range(0, num_replicates, block):
        rows = replicates[start : start + block]
        drawn = rng.multinomial(len(counts), sizes / len(counts), size=len(rows)) @ kinds
        rows[:, :4] = drawn / drawn.sum(1, keepdims=True)
    replicates[:, 4] = replicates[:, B] - replicates[:, A]
    return replicates


def expanded_percentiles(
    replicates: Float[np.ndarray, "replicates k"], num_prompts: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return percentiles widened for few prompts (Hesterberg, arXiv:1411.5279, section 5.3)."""
    if num_prompts < 2:
        k = replicates.shape[1]
        return np.full(k, -np.inf), np.full(k, np.inf)
    widened = student_quantile(1 - LEVEL / 2, num_prompts - 1)
    tail = NormalDist().cdf(-math.sqrt(num_prompts / (num_prompts - 1)) * widened)
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    return low, high


def student_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile (Hill 1970, Algorithm 396 via Abramowitz & Stegun 26.7.5)."""
    z, v = NormalDist().inv_cdf(probability), freedom
    return z + (
        (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def _open_degenerate(
    estimates: Float[np.ndarray, " k"],
    low: Float[np.ndarray, " k"],
    high: Float[np.ndarray, " k"],
    num_prompts: int,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Widen intervals of zero width, where all prompts agree, to the exact binomial bound."""
    unseen = 1 - (LEVEL / 2) ** (1 / num_prompts)  # Clopper and Pearson for 0 of num_prompts
    flat = low == high
    low, high = np.where(flat, estimates - unseen, low), np.where(flat, estimates + unseen, high)
    smallest = np.array([0.0, 0.0, 0.0, 0.0, -1.0])
    return np.clip(low, smallest, 1), np.clip(high, smallest, 1)


def sign_flip_p_value(
    counts: Counts, rng: np.random.Generator, num_replicates: int = NUM_REPLICATES
) -> float:
    """Return the two-sided p-value of no preference: each prompt's A and B may be swapped.

    With one vote per pair this is the sign test. The smallest value is 1 / (num_replicates + 1).
    """
    differences = counts[:, B] - counts[:, A]
    sizes = np.bincount(np.abs(differences))
    # Of the prompts with one absolute difference, a binomial number points to B.
    to_b = rng.binomial(sizes, 0.5, size=(num_replicates, len(sizes)))
    flipped = (2 * to_b - sizes) @ np.arange(len(sizes))
    extreme = int((np.abs(flipped) >= abs(differences.sum())).sum())
    return (extreme + 1) / (num_replicates + 1)


def holm(p_values: list[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def krippendorff_alpha(counts: Int[np.ndarray, "units categories"]) -> float:
    """Return the nominal alpha of units rated by any number of raters; nan if undefined.

    1 is perfect agreement, 0 is chance (Krippendorff, Computing Krippendorff's
    Alpha-Reliability, 2011, section C). Units with fewer than two votes do not count.
    """
    counts = counts[counts.sum(1) > 1].astype(np.float64)
    if not len(counts):
        return math.nan
    sizes = counts.sum(1)
    totals, pairable = counts.sum(0), sizes.sum()
    observed = ((sizes**2 - (counts**2).sum(1)) / (sizes - 1)).sum() / pairable
    expected = (pairable**2 - (totals**2).sum()) / (pairable * (pairable - 1))
    return float(1 - observed / expected) if expected > 0 else math.nan


def alpha_interval(
    counts: Int[np.ndarray, "units categories"],
    rng: np.random.Generator,
    num_replicates: int = 1000,
) -> Interval:
    """Return alpha with the percentile interval over prompts."""
    counts = counts[counts.sum(1) > 1]
    estimate = krippendorff_alpha(counts)
    if math.isnan(estimate):
        return Interval(math.nan, math.nan, math.nan)
    draws = rng.integers(0, len(counts), size=(num_replicates, len(counts)))
    replicates = np.array([krippendorff_alpha(counts[draw]) for draw in draws])
    defined: Bool[np.ndarray, " n"] = ~np.isnan(replicates)
    low, high = np.quantile(replicates[defined], [LEVEL / 2, 1 - LEVEL / 2])
    return Interval(estimate, float(low), float(high))


def fair_coin_p_value(heads: int, flips: int) -> float:
    """Return the exact two-sided binomial p-value of a fair coin."""
    fewer = min(heads, flips - heads)
    tail = sum(math.comb(flips, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**flips)
