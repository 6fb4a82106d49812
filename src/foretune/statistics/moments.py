"""Streaming first and second moments (Chan, Golub & LeVeque, 1983): exact to merge, in any order and grouping."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ROWS_AT_ONCE = 4096


class MomentState(NamedTuple):
    """Count, mean and centred scatter of the rows seen so far.

    Attributes:
        count: rows seen.
        mean: their mean, shape (dim,).
        scatter: Σ (x − mean)(x − mean)ᵀ, shape (dim, dim).
    """

    count: int
    mean: FloatArray
    scatter: FloatArray


def empty(dim: int) -> MomentState:
    """The state before any row."""
    return MomentState(0, np.zeros(dim), np.zeros((dim, dim)))


def of_rows(rows: FloatArray) -> MomentState:
    """The state of `rows`, shape (n, dim); n may be 0. Read in blocks, so that no centred copy of all rows is made."""
    state = empty(rows.shape[1])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        mean = block.mean(0)
        centred = block - mean
        state = merge(state, MomentState(len(block), mean, centred.T @ centred))
    return state


def merge(left: MomentState, right: MomentState) -> MomentState:
    """The state of both sets of rows together."""
    count = left.count + right.count
    if count == 0:
        return left
    gap = right.mean - left.mean
    mean = left.mean + gap * (right.count / count)
    scatter = left.scatter + right.scatter + np.outer(gap, gap) * (left.count * right.count / count)
    return MomentState(count, mean, scatter)


def covariance(state: MomentState) -> FloatArray:
    """Unbiased covariance, shape (dim, dim); NaN with fewer than two rows."""
    if state.count < 2:
        return np.full_like(state.scatter, np.nan)
    return state.scatter / (state.count - 1)


def trace(state: MomentState) -> float:
    """Tr Σ: total variance; NaN with fewer than two rows."""
    return float(np.trace(state.scatter) / (state.count - 1)) if state.count > 1 else float("nan")


def operator_norm(state: MomentState) -> float:
    """‖Σ‖_op: the largest variance in any direction; NaN with fewer than two rows."""
    if state.count < 2:
        return float("nan")
    from scipy.linalg import eigh

    last = len(state.mean) - 1
    return float(eigh(state.scatter, eigvals_only=True, subset_by_index=[last, last])[0] / (state.count - 1))
