"""Streaming first and second moments (Chan, Golub & LeVeque, 1983): exact to merge, in any order and grouping."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
# In memory while a source is read: 8 MB of float64, which stay in a cache and are not fetched from the system anew.
NUMBERS_AT_ONCE = 2**20


class RowSource(Protocol):
    """Rows that may lie on disk: an array, or anything that gives an array for a slice or for indices of rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, dim)."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Those rows as an array, shape (len(rows), dim)."""
        ...


class Rows:
    """Some rows of a source, read when they are asked for.

    Args:
        source: where they are.
        members: which rows, shape (n,).
    """

    def __init__(self, source: RowSource, members: NDArray[np.int64]) -> None:
        """Read nothing yet."""
        self.source, self.members = source, members
        self.shape = (len(members), *source.shape[1:])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.members)

    def __getitem__(self, rows: Any) -> NDArray:
        """Those of the rows, as an array."""
        return self.source[self.members[rows]]


def blocks_of(rows: RowSource) -> Iterator[FloatArray]:
    """All rows in order, some at a time, as float64."""
    count = max(1, NUMBERS_AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), count):
        yield np.asarray(rows[start : start + count], dtype=float)


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


def of_rows(rows: RowSource) -> MomentState:
    """The state of `rows`, shape (n, dim); n may be 0. Read in blocks, so that no centred copy of all rows is made."""
    state = empty(rows.shape[1])
    for block in blocks_of(rows):
        mean = block.mean(0)
        centred = block - mean
        state = merge(state, MomentState(len(block), mean, centred.T @ centred))
    return state


def variation_of_rows(rows: RowSource) -> tuple[FloatArray, float]:
    """(mean, tr Σ) of `rows` without the scatter matrix: for features of many dimensions; NaN as in `trace`."""
    count, mean, total = 0, np.zeros(rows.shape[1]), 0.0
    for block in blocks_of(rows):
        own, both = block.mean(0), count + len(block)
        total += float(np.sum((block - own) ** 2) + np.sum((own - mean) ** 2) * (count * len(block) / both))
        mean, count = mean + (own - mean) * (len(block) / both), both
    return mean, total / (count - 1) if count > 1 else float("nan")


def merge(left: MomentState, right: MomentState) -> MomentState:
    """The state of both sets of rows together."""
    count = left.count + right.count
    if count == 0:
        return left
    gap = right.mean - left.mean
    mean = left.mean + gap * (right.count / count)
    scatter = np.outer(gap * (left.count * right.count / count), gap)
    scatter += left.scatter
    scatter += right.scatter
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
    return _largest_eigenvalue(state.scatter) / (state.count - 1) if state.count > 1 else float("nan")


def second_moment_norm(rows: RowSource) -> float:
    """λ_max of (1/n) Σ x xᵀ, rows (n, dim) read in blocks; by the smaller of the n × n and the dim × dim matrix."""
    if len(rows) <= rows.shape[1]:
        whole = np.asarray(rows[0 : len(rows)], dtype=float)
        return _largest_eigenvalue(whole @ whole.T) / len(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for block in blocks_of(rows):
        total += block.T @ block
    return _largest_eigenvalue(total) / len(rows)


def _largest_eigenvalue(matrix: FloatArray) -> float:
    from scipy.linalg import eigh

    last = len(matrix) - 1
    return float(eigh(matrix, eigvals_only=True, subset_by_index=[last, last])[0])
