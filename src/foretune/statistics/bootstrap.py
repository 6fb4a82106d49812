"""The percentile bootstrap of any statistic of interchangeable items."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.moments import FloatArray

DRAWS = 2000
# a statistic of drawn items: indices, shape (draws, n) → (draws,)
Statistic = Callable[[NDArray[np.int64]], FloatArray]


def percentile_bootstrap(
    statistic: Statistic, count: int, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of `count` items with its 95 % interval; draws in which it is undefined are left out.

    >>> values = np.arange(10.0)
    >>> percentile_bootstrap(lambda drawn: values[drawn].mean(1), 10)[0]
    4.5
    """
    value = float(statistic(np.arange(count)[None])[0])
    drawn = statistic(np.random.default_rng(seed).integers(count, size=(draws, count)))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return value, float(low), float(high)
