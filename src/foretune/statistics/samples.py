"""Two kinds of sample that a behaviour's difference of means comes from, each with its own resampling.

- `TwoClasses`: one-token answers (Yes/No). A row belongs to D+ or D−; the difference is between the classes' means.
- `Differences`: free text. A row carries a chosen and a rejected response; the difference is the mean of differences.

Both are linear in the rows: difference = Σ_i c_i x_i. So a bootstrap draw or a permutation is a row of coefficients,
and many of them are one matrix product.
"""

from dataclasses import dataclass

import numpy as np

from foretune.statistics.moments import FloatArray, of_rows, operator_norm, trace


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

    def sampling_bias(self) -> float:
        """E‖Δ̂‖² − ‖Δ‖² = trΣ₊/n₊ + trΣ₋/n₋ (theory T7)."""
        return sum(trace(of_rows(part)) / len(part) for part in self._parts())

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

    def spreads(self) -> tuple[float, float]:
        """(concentration, trace): the larger class's ‖Σ‖_op and trΣ, over both classes."""
        return _largest_spreads(self._parts())

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

    def alignments(self) -> FloatArray:
        """Where each row lies along Δ without itself: 1 at its class mean, 0 half way, −1 at the other mean; (n,)."""
        found = np.empty(len(self.rows))
        for members in (self.is_plus, ~self.is_plus):
            rows, other = self.rows[members], self.rows[~members].mean(0)
            own = (len(rows) * rows.mean(0) - rows) / (len(rows) - 1)
            gap = own - other
            middle = (own + other) / 2
            found[members] = np.sum((rows - middle) * gap, axis=1) / (np.sum(gap**2, axis=1) / 2)
        return found

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

    def sampling_bias(self) -> float:
        """E‖Δ̂‖² − ‖Δ‖² = trΣ/n of the differences."""
        return trace(of_rows(self.rows)) / len(self.chosen)

    def bootstrap(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients of resampled rows; shape (draws, n)."""
        count = len(self.chosen)
        return generator.multinomial(count, np.full(count, 1 / count), draws) / count

    def permutations(self, draws: int, generator: np.random.Generator) -> FloatArray:
        """Coefficients with chosen and rejected swapped at random; shape (draws, n)."""
        count = len(self.chosen)
        return generator.choice([-1.0, 1.0], (draws, count)) / count

    def spreads(self) -> tuple[float, float]:
        """(concentration, trace): the larger of both responses' ‖Σ‖_op and trΣ."""
        return _largest_spreads((self.chosen, self.rejected))

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

    def alignments(self) -> FloatArray:
        """Each row's difference along the others' mean difference, relative to its length: 1 at the mean; (n,)."""
        rows = self.rows
        others = (len(rows) * rows.mean(0) - rows) / (len(rows) - 1)
        return np.sum(rows * others, axis=1) / np.sum(others**2, axis=1)


Sample = TwoClasses | Differences


def _class_means(is_plus: np.ndarray) -> FloatArray:
    """+1/n₊ for D+, −1/n₋ for D−; labels (…, n)."""
    plus = is_plus.sum(-1, keepdims=True)
    return np.where(is_plus, 1 / plus, -1 / (is_plus.shape[-1] - plus))


def _largest_spreads(parts: tuple[FloatArray, FloatArray]) -> tuple[float, float]:
    states = [of_rows(part) for part in parts]
    return max(operator_norm(state) for state in states), max(trace(state) for state in states)
