"""Two kinds of sample that a behaviour's difference of means comes from, each with its own resampling.

- `TwoClasses`: one-token answers (Yes/No). A row belongs to D+ or D−; the difference is between the classes' means.
- `Differences`: free text. A row carries a chosen and a rejected response; the difference is the mean of differences.

Both are linear in the rows: difference = Σ_i c_i x_i. So a bootstrap draw or a permutation is a row of coefficients,
and many of them are one matrix product.

A sample may stand for a larger whole, of which it holds some rows. What is exact of the whole is a `Whole`; noise that
is resampled from fewer rows is scaled down to the whole's size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from foretune.statistics.moments import (
    FloatArray,
    Rows,
    RowSource,
    blocks_of,
    of_rows,
    operator_norm,
    trace,
    variation_of_rows,
)


class Whole(NamedTuple):
    """What is exact over all rows of a behaviour, however many there are.

    Attributes:
        difference: Δ̂, shape (dim,).
        bias: E‖Δ̂‖² − ‖Δ‖² (theory T7).
        concentration: the larger side's ‖Σ‖_op.
        trace: the larger side's tr Σ.
        counts: rows of each class, or (rows,) of differences.
    """

    difference: FloatArray
    bias: float
    concentration: float
    trace: float
    counts: tuple[int, ...]


def whole_of_classes(rows: RowSource, is_plus: np.ndarray) -> Whole:
    """Of rows (n, dim) in two classes (n,), read in blocks; one class's scatter at a time."""
    means, figures = [], []
    for members in (np.flatnonzero(is_plus), np.flatnonzero(~is_plus)):
        state = of_rows(Rows(rows, members))
        means.append(state.mean)
        figures.append((trace(state) / len(members), operator_norm(state), trace(state), len(members)))
    biases, norms, traces, counts = zip(*figures, strict=True)
    return Whole(means[0] - means[1], sum(biases), max(norms), max(traces), counts)


def whole_of_differences(chosen: RowSource, rejected: RowSource) -> Whole:
    """Of rows that carry both responses, (n, dim) each, read in blocks; one response's scatter at a time."""
    gap, variation = variation_of_rows(Gaps(chosen, rejected))
    figures = [(operator_norm(state), trace(state)) for state in map(of_rows, (chosen, rejected))]
    norms, traces = zip(*figures, strict=True)
    return Whole(gap, variation / len(chosen), max(norms), max(traces), (len(chosen),))


class Gaps:
    """Chosen − rejected, read when it is asked for."""

    def __init__(self, chosen: RowSource, rejected: RowSource) -> None:
        """Keep both sides, (n, dim) each."""
        self.chosen, self.rejected = chosen, rejected
        self.shape = chosen.shape

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.chosen)

    def __getitem__(self, rows: slice | np.ndarray) -> FloatArray:
        """Those rows."""
        return self.chosen[rows].astype(float) - self.rejected[rows]


@dataclass(frozen=True)
class TwoClasses:
    """Rows of two classes.

    Attributes:
        rows: features, shape (n, dim).
        is_plus: class membership, shape (n,), bool.
    """

    rows: FloatArray
    is_plus: np.ndarray

    @property
    def defined(self) -> bool:
        """Whether both classes have rows enough for a spread (two each)."""
        return min(self.is_plus.sum(), (~self.is_plus).sum()) >= 2

    def coefficients(self) -> FloatArray:
        """C with difference = c @ rows, shape (n,)."""
        return _class_means(self.is_plus)

    def whole(self) -> Whole:
        """The figures of these rows alone."""
        return whole_of_classes(self.rows, self.is_plus)

    def noise_scale(self, whole: Whole) -> FloatArray:
        """Per row √(its class here / its class in the whole): what shrinks resampling noise to the whole's; (n,)."""
        counts = (self.is_plus.sum(), (~self.is_plus).sum())
        plus, minus = (np.sqrt(here / there) for here, there in zip(counts, whole.counts, strict=True))
        return np.where(self.is_plus, plus, minus)

    def floor_scale(self, whole: Whole) -> float:
        """The same of a permutation, whose noise is the pooled variance times 1/n₊ + 1/n₋."""
        here = 1 / self.is_plus.sum() + 1 / (~self.is_plus).sum()
        return float(np.sqrt(sum(1 / count for count in whole.counts) / here))

    def bootstrap(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients of resampled rows, classes resampled apart; shape (draws, n)."""
        coefficients = np.zeros((draws, len(self.rows)))
        for members, sign in ((self.is_plus, 1.0), (~self.is_plus, -1.0)):
            count = int(members.sum())
            coefficients[:, members] = sign * generator.multinomial(count, np.full(count, 1 / count), draws) / count
        return coefficients

    def permutations(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients under permuted labels; shape (draws, n)."""
        labels = np.broadcast_to(self.is_plus, (draws, len(self.rows)))
        return _class_means(generator.permuted(labels, axis=1))

    def halves(self, generator: np.random.Generator) -> tuple["TwoClasses", "TwoClasses"]:
        """A random split in two, classes split apart."""
        first = np.zeros(len(self.rows), dtype=bool)
        for members in (np.flatnonzero(self.is_plus), np.flatnonzero(~self.is_plus)):
            first[generator.permutation(members)[: (len(members) + 1) // 2]] = True
        return tuple(TwoClasses(self.rows[side], self.is_plus[side]) for side in (first, ~first))  # pyright: ignore

    def projected_separation(self, direction: FloatArray) -> float:
        """(mean₊ − mean₋) / pooled standard deviation, along `direction`."""
        plus, minus = (part @ direction for part in self._parts())
        return float((plus.mean() - minus.mean()) / np.sqrt((plus.var(ddof=1) + minus.var(ddof=1)) / 2))

    def _parts(self) -> tuple[FloatArray, FloatArray]:
        return self.rows[self.is_plus], self.rows[~self.is_plus]


@dataclass(frozen=True)
class Differences:
    """Rows that each carry both responses.

    Attributes:
        chosen: feature of the chosen response, shape (n, dim).
        rejected: feature of the rejected response, shape (n, dim).
    """

    chosen: FloatArray
    rejected: FloatArray

    @property
    def rows(self) -> FloatArray:
        """Chosen − rejected, shape (n, dim)."""
        return self.chosen - self.rejected

    @property
    def defined(self) -> bool:
        """Whether there are rows enough for a spread."""
        return len(self.chosen) >= 4

    def coefficients(self) -> FloatArray:
        """1/n for each row."""
        return np.full(len(self.chosen), 1 / len(self.chosen))

    def whole(self) -> Whole:
        """The figures of these rows alone."""
        return whole_of_differences(self.chosen, self.rejected)

    def noise_scale(self, whole: Whole) -> FloatArray:
        """√(rows here / rows of the whole), which shrinks resampling noise to the whole's, for each row; (n,)."""
        return np.full(len(self.chosen), self.floor_scale(whole))

    def floor_scale(self, whole: Whole) -> float:
        """The same of a permutation."""
        return float(np.sqrt(len(self.chosen) / whole.counts[0]))

    def bootstrap(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients of resampled rows; shape (draws, n)."""
        count = len(self.chosen)
        return generator.multinomial(count, np.full(count, 1 / count), draws) / count

    def permutations(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients with chosen and rejected swapped at random; shape (draws, n)."""
        count = len(self.chosen)
        return generator.choice([-1.0, 1.0], (draws, count)) / count

    def halves(self, generator: np.random.Generator) -> tuple["Differences", "Differences"]:
        """A random split in two."""
        order = generator.permutation(len(self.chosen))
        middle = (len(order) + 1) // 2
        return tuple(  # pyright: ignore
            Differences(self.chosen[side], self.rejected[side]) for side in (order[:middle], order[middle:])
        )

    def projected_separation(self, direction: FloatArray) -> float:
        """(mean chosen − mean rejected) / pooled standard deviation, along `direction`."""
        chosen, rejected = self.chosen @ direction, self.rejected @ direction
        return float((chosen.mean() - rejected.mean()) / np.sqrt((chosen.var(ddof=1) + rejected.var(ddof=1)) / 2))


Sample = TwoClasses | Differences


def _class_means(is_plus: np.ndarray) -> FloatArray:
    """+1/n₊ for D+, −1/n₋ for D−; labels (…, n)."""
    plus = is_plus.sum(-1, keepdims=True)
    return np.where(is_plus, 1 / plus, -1 / (is_plus.shape[-1] - plus))


def class_alignments(rows: RowSource, is_plus: np.ndarray) -> FloatArray:
    """Where each row lies along Δ without itself: 1 at its class mean, 0 half way, −1 at the other mean; (n,).

    Two passes over rows (n, dim) in classes (n,), in blocks.
    """
    found = np.empty(len(rows))
    classes = [np.flatnonzero(is_plus), np.flatnonzero(~is_plus)]
    means = [mean_of_rows(Rows(rows, members)) for members in classes]
    for members, mean, other in zip(classes, means, means[::-1], strict=True):
        place = 0
        for block in blocks_of(Rows(rows, members)):
            own = (len(members) * mean - block) / (len(members) - 1)
            gap, middle = own - other, (own + other) / 2
            along = np.sum((block - middle) * gap, axis=1) / (np.sum(gap**2, axis=1) / 2)
            found[members[place : place + len(block)]] = along
            place += len(block)
    return found


def difference_alignments(chosen: RowSource, rejected: RowSource) -> FloatArray:
    """Each row's difference along the others' mean difference, relative to its length: 1 at the mean; (n,).

    Two passes over both sides, (n, dim) each, in blocks.
    """
    gaps = Gaps(chosen, rejected)
    mean, parts = mean_of_rows(gaps), []
    for block in blocks_of(gaps):
        others = (len(gaps) * mean - block) / (len(gaps) - 1)
        parts.append(np.sum(block * others, axis=1) / np.sum(others**2, axis=1))
    return np.concatenate(parts)


def mean_of_rows(rows: RowSource) -> FloatArray:
    """The mean of n rows read in blocks, shape (dim,); n at least 1."""
    return np.sum([block.sum(0) for block in blocks_of(rows)], axis=0) / len(rows)
