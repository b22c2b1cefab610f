"""95 % confidence intervals of means over questions: the percentile bootstrap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def bootstrap(values: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """The 2.5 % and 97.5 % quantiles of the mean of each column of values [n, m], over resamples of the n rows: (low [m], high [m])."""
    # Where a column is constant its interval is that constant, exactly: summation must not blur it.
    means = np.clip(resampled(values, resamples, seed), values.min(axis=0), values.max(axis=0))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def resampled(values: Floats, resamples: int, seed: int) -> Floats:
    """The means of the columns of values [n, m] over resamples of the rows: [resamples, m].

    One resample is used for all columns, so the columns (methods, metrics) are resampled together. The same n and seed always
    give the same resamples.
    """
    n = len(values)
    generator = np.random.default_rng([seed, n])
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)  # how often each row is drawn: [resamples, n]
    means: Floats = counts @ values / n
    return means
