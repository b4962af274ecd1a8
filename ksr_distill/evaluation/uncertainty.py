"""Bootstrap intervals over images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ksr_distill.randomness import Stream

NUM_RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean over images with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Float[np.ndarray, " image"], *, seed: int) -> Interval:
    """Return the mean and its 95 % percentile interval over resampled images (Efron 1979).

    One image has no spread, so its interval is its value. Below some ten images the interval is too
    narrow: five images cannot show the tail of the set they come from.

    Args:
        values: One finite number per image. For a paired comparison, the differences per image.
    """
    rng = np.random.default_rng([seed, Stream.EVALUATION])
    chosen = rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
