"""Intervals of what is computed over behaviours: 95 % percentile bootstrap, behaviours drawn with replacement."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from foretune.claims.claim import Estimate
from foretune.statistics.bootstrap import DRAWS, Statistic, percentile_bootstrap

FloatArray = NDArray[np.float64]


def bootstrap(statistic: Statistic, count: int, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """A statistic of `count` behaviours with its interval; draws in which it is undefined are left out."""
    return Estimate(*percentile_bootstrap(statistic, count, draws=draws, seed=seed))


def mean(values: FloatArray) -> Estimate:
    """The mean over behaviours, values (n,)."""
    values = np.asarray(values, dtype=float)
    return bootstrap(lambda drawn: values[drawn].mean(1), len(values))


def spearman(left: FloatArray, right: FloatArray) -> Estimate:
    """Spearman's rank correlation over behaviours, both (n,).

    >>> spearman(np.arange(9.0), np.arange(9.0) ** 3).low
    1.0
    """
    left, right = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    return bootstrap(lambda drawn: rank_correlation(left[drawn], right[drawn]), len(left))


def log_slope(x: FloatArray, y: FloatArray) -> Estimate:
    """Least-squares slope of log y on log x over behaviours, both (n,) and positive."""
    x, y = np.log(x), np.log(y)

    def slope(drawn: NDArray[np.int64]) -> FloatArray:
        a, b = (part[drawn] - part[drawn].mean(1, keepdims=True) for part in (x, y))
        with np.errstate(invalid="ignore"):
            return (a * b).sum(1) / (a**2).sum(1)

    return bootstrap(slope, len(x))


def over_pairs(
    statistic: Callable[[NDArray[np.int64]], float], pairs: NDArray[np.int64], *, draws: int = 500
) -> Estimate:
    """A statistic of pairs of behaviours; whole behaviours are drawn, since pairs that share one are not independent.

    Args:
        statistic: of indices into `pairs`, with repetitions.
        pairs: the two behaviours of each, shape (p, 2).
        draws: of behaviours.
    """
    generator, names = np.random.default_rng(0), np.unique(pairs)
    place = np.searchsorted(names, pairs)
    found = []
    for _ in range(draws):
        times = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))
        chosen = np.repeat(np.arange(len(pairs)), times[place].prod(1))
        if len(chosen):
            found.append(statistic(chosen))
    found = np.array(found)[np.isfinite(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (np.nan, np.nan)
    return Estimate(float(statistic(np.arange(len(pairs)))), float(low), float(high))


def rank_correlation(left: FloatArray, right: FloatArray) -> FloatArray:
    """Spearman's correlation of each row, (…, n) → (…,); NaN where a row is constant."""
    ranks = [rankdata(part, axis=-1) for part in (left, right)]
    a, b = (part - part.mean(-1, keepdims=True) for part in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
