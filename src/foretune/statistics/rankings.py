"""Features of rankings from those of their contrasts: the mean over all pairs of responses that are not tied.

A response that is the better one of a pairs and the worse one of b, of P in all, counts (a − b)/P. The last-ranked
response, which every contrast is against, drops out of the differences, because these weights sum to 0.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.behaviours import Measured
from foretune.statistics.moments import FloatArray, Rows, RowSource


class Combination:
    """Weighted sums of rows, computed when they are asked for.

    Args:
        members: the rows that each sum is of, shape (n, k); those with weight 0 may be any.
        terms: pairs of a source and its weights, shape (n, k).
    """

    def __init__(self, members: NDArray[np.int64], *terms: tuple[RowSource, FloatArray]) -> None:
        """Read nothing yet."""
        self._members, self._terms = members, terms
        self.shape = (len(members), *terms[0][0].shape[1:])

    def __len__(self) -> int:
        """Number of sums."""
        return len(self._members)

    def __getitem__(self, rows: Any) -> FloatArray:
        """Those sums, shape (len(rows), dim)."""
        own = self._members[rows]
        parts = [
            np.einsum("rk,rkd->rd", weights[rows], np.asarray(source[own.ravel()], dtype=float).reshape(*own.shape, -1))
            for source, weights in self._terms
        ]
        return np.sum(parts, axis=0)


def measured_rankings(pairs: Measured, members: NDArray[np.int64], ranks: NDArray[np.int64]) -> Measured:
    """One row a ranking, of rows that are contrasts.

    Args:
        pairs: features of the contrasts.
        members: of each ranking, best response first, −1 at the end of shorter ones, shape (R, K−1).
        ranks: of its responses, the last-ranked one right after those of `members`, then 0; shape (R, K).
    """
    present = (ranks[:, :, None] > 0) & (ranks[:, None, :] > 0)
    worse = (ranks[:, None, :] > ranks[:, :, None]) & present
    total = worse.sum((1, 2))[:, None]
    as_better, as_worse = worse.sum(2) / total, worse.sum(1) / total
    last = np.zeros_like(as_worse[:, :-1])
    last[:, 0] = as_worse[np.arange(len(ranks)), (ranks > 0).sum(1) - 1]
    first, contrasts = members[:, 0], np.maximum(members, 0)
    own = members >= 0
    a, b = as_better[:, :-1] * own, as_worse[:, :-1] * own
    sketch = Combination(contrasts, (pairs.sketch, a - b))
    return Measured(
        pairs.behaviour_of[first],
        pairs.split_of[first],
        pairs.weights[first],
        np.full(len(first), -1),
        Rows(pairs.first_state, first),
        Combination(contrasts, (pairs.chosen_mean, a)),
        Combination(contrasts, (pairs.chosen_mean, b), (pairs.rejected_mean, last)),
        sketch,
        sketch,
        pairs.pair_id[first],
    )
