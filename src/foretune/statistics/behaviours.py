"""All statistics of all behaviours: the rows of behaviours.parquet and the behaviour kernel."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.distinguishability import UNDEFINED, distinguishability, generalised_distinguishability
from foretune.statistics.moments import FloatArray, Rows, RowSource
from foretune.statistics.priority import (
    BehaviourKernel,
    behaviour_kernel,
    differences_kernel,
    initial_rates,
    priority_levels,
)
from foretune.statistics.samples import (
    Differences,
    Sample,
    TwoClasses,
    Whole,
    class_alignments,
    difference_alignments,
    mean_of_rows,
    whole_of_classes,
    whole_of_differences,
)

# Resampling takes at most so many rows of a behaviour: the noise of quantiles from 1000 draws is larger than what more
# rows would tell.
RESAMPLED_ROWS = 2000
# Of a rare answer at least so many, where there are so many.
RARE_ROWS = 50


class Measured(NamedTuple):
    """Features of n pairs. Those with a dimension may lie on disk: see `RowSource`.

    Attributes:
        behaviour_of: shape (n,).
        split_of: shape (n,).
        weights: row weights, shape (n,).
        answer: which of the two answers each pair prefers (0 or 1), −1 where its behaviour has no two answers; (n,).
        first_state: hidden state at the last prompt token, shape (n, hidden).
        chosen_mean: mean hidden state over the chosen response, shape (n, hidden).
        rejected_mean: the same of the rejected response, shape (n, hidden).
        sketch: sketched gradient of the whole responses, shape (n, dim).
        kernel_features: the φ that kernel, priority and flow are computed from, shape (n, any).
        pair_id: shape (n,); they decide which rows are resampled where not all are.
    """

    behaviour_of: np.ndarray
    split_of: np.ndarray
    weights: FloatArray
    answer: np.ndarray
    first_state: RowSource
    chosen_mean: RowSource
    rejected_mean: RowSource
    sketch: RowSource
    kernel_features: RowSource
    pair_id: np.ndarray

    def members(self, behaviour: str, split: str) -> NDArray[np.int64]:
        """Indices of the pairs of one behaviour and split."""
        return np.flatnonzero((self.behaviour_of == behaviour) & (self.split_of == split))

    def two_answers(self, members: NDArray[np.int64]) -> bool:
        """Whether these pairs share two one-token answers."""
        return bool((self.answer[members] >= 0).all())

    def defined(self, members: NDArray[np.int64]) -> bool:
        """Whether these pairs are enough for a distinguishability."""
        if self.two_answers(members):
            return 2 <= (self.answer[members] == 0).sum() <= len(members) - 2
        return len(members) >= 4

    def sample(self, members: NDArray[np.int64]) -> Sample:
        """One behaviour's rows in memory, at most RESAMPLED_ROWS: two classes of one-token answers, or differences."""
        chosen = members[representatives(self.pair_id[members], self.answer[members], RESAMPLED_ROWS)]
        if self.two_answers(members):
            return TwoClasses(_floats(self.first_state[chosen]), self.answer[chosen] == 0)
        return Differences(_floats(self.chosen_mean[chosen]), _floats(self.rejected_mean[chosen]))

    def whole(self, members: NDArray[np.int64]) -> Whole:
        """What is exact over all of one behaviour's rows, read in blocks."""
        if self.two_answers(members):
            return whole_of_classes(Rows(self.first_state, members), self.answer[members] == 0)
        return whole_of_differences(Rows(self.chosen_mean, members), Rows(self.rejected_mean, members))


def representatives(pair_ids: np.ndarray, strata: np.ndarray, limit: int) -> NDArray[np.int64]:
    """Places of about `limit` rows drawn by their ids, whatever their order; all, in order, where there are fewer.

    Each stratum has its share of them, a rare one at least RARE_ROWS.

    Args:
        pair_ids: shape (n,).
        strata: a label a row, shape (n,).
        limit: rows wanted.
    """
    if len(pair_ids) <= limit:
        return np.arange(len(pair_ids))
    lot = _mixed(pair_ids)
    parts = []
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        count = max(round(limit * len(members) / len(pair_ids)), min(RARE_ROWS, len(members)))
        parts.append(members[np.argsort(lot[members], kind="stable")[:count]])
    return np.concatenate(parts)


def _mixed(ids: np.ndarray) -> NDArray[np.uint64]:
    """Well mixed bits of each id (SplitMix64's finaliser): ids may count rows in an order that means something."""
    bits = ids.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _floats(rows: np.ndarray) -> FloatArray:
    return np.asarray(rows, dtype=float)


def yes_no_features(first_state: FloatArray, answer: np.ndarray) -> FloatArray:
    """φ of pairs that share two one-token answers, in fewer numbers: (e_a − e_b) ⊗ x has norm √2‖x‖ (theory T13)."""
    return np.sqrt(2.0) * np.where(answer == 0, 1.0, -1.0)[:, None] * first_state


class YesNoFeatures:
    """The same for first states that lie on disk, (n, hidden), and their answers (n,)."""

    def __init__(self, first_state: RowSource, answer: np.ndarray) -> None:
        """Read nothing yet."""
        self.first_state, self.answer = first_state, answer
        self.shape = first_state.shape

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.first_state)

    def __getitem__(self, rows: np.ndarray) -> FloatArray:
        """φ of these rows."""
        return yes_no_features(self.first_state[rows], self.answer[rows])


def training_kernel(measured: Measured) -> BehaviourKernel:
    """The behaviour kernel of the training pairs, shares of weight included."""
    train = np.flatnonzero(measured.split_of == "train")
    return behaviour_kernel(
        Rows(measured.kernel_features, train),
        measured.behaviour_of[train],
        measured.weights[train],
        behaviours=[str(name) for name in np.unique(measured.behaviour_of[train])],
    )


def training_priorities(measured: Measured, kernel: BehaviourKernel) -> FloatArray:
    """Priority levels: of Δ_k = μ₊ − μ₋ as in the paper where answers are shared, else of the mean features.

    NaN for a behaviour whose Δ is undefined.
    """
    if measured.kernel_features is measured.sketch:
        return priority_levels(kernel)
    differences = np.full((len(kernel.behaviours), measured.first_state.shape[1]), np.nan)
    for index, behaviour in enumerate(kernel.behaviours):
        members = measured.members(behaviour, "train")
        if measured.defined(members):
            sides = [members[measured.answer[members] == answer] for answer in (0, 1)]
            plus, minus = (mean_of_rows(Rows(measured.first_state, side)) for side in sides)
            differences[index] = plus - minus
    found = priority_levels(differences_kernel(differences, kernel.weights, behaviours=kernel.behaviours))
    return np.where(np.isfinite(differences).all(1), found, np.nan)


def behaviour_rows(measured: Measured, kernel: BehaviourKernel, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row a behaviour and split, training split first.

    All figures are of all rows, but those that come from resampling (interval, floor, separability), which takes a
    sample of RESAMPLED_ROWS of a larger behaviour.
    """
    priorities = dict(zip(kernel.behaviours, training_priorities(measured, kernel), strict=True))
    rates = dict(zip(kernel.behaviours, initial_rates(kernel), strict=True))
    rows = []
    for split in sorted(np.unique(measured.split_of), reverse=True):
        for behaviour in np.unique(measured.behaviour_of[measured.split_of == split]):
            members = measured.members(behaviour, split)
            found = UNDEFINED
            if measured.defined(members):
                whole = measured.whole(members)
                found = distinguishability(measured.sample(members), draws=draws, seed=seed, whole=whole)
            general, debiased = generalised_distinguishability(Rows(measured.sketch, members), measured.answer[members])
            rows.append(
                {
                    "behaviour": str(behaviour),
                    "split": str(split),
                    "num_pairs": len(members),
                    "distinguishability": found.value,
                    "distinguishability_debiased": found.debiased,
                    "distinguishability_low": found.low,
                    "distinguishability_high": found.high,
                    "permutation_floor": found.floor,
                    "concentration": found.concentration,
                    "trace": found.trace,
                    "separability": found.separability,
                    "priority": float(priorities.get(behaviour, np.nan)),
                    "generalised_distinguishability": general,
                    "generalised_distinguishability_debiased": debiased,
                    "initial_rate": float(rates.get(behaviour, np.nan)),
                }
            )
    return rows


def alignments(measured: Measured) -> FloatArray:
    """How far each training pair lies on its behaviour's own side, shape (n,).

    1 is typical, 0 the border, negative the other side: mislabelled, or an example of something else. NaN for held-out
    pairs and for behaviours whose distinguishability is undefined.
    """
    found = np.full(len(measured.behaviour_of), np.nan)
    for behaviour in np.unique(measured.behaviour_of):
        members = measured.members(behaviour, "train")
        if not len(members) or not measured.defined(members):
            continue
        if measured.two_answers(members):
            states = Rows(measured.first_state, members)
            found[members] = class_alignments(states, measured.answer[members] == 0)
        else:
            sides = Rows(measured.chosen_mean, members), Rows(measured.rejected_mean, members)
            found[members] = difference_alignments(*sides)
    return found


class NumberedAnswers(NamedTuple):
    """The two answers of a behaviour.

    Attributes:
        options: their token ids, sorted.
        preferred: the number of each pair's chosen one, shape (n,).
    """

    options: list[tuple[int, ...]]
    preferred: NDArray[np.int64]


def numbered_answers(answers: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> NumberedAnswers | None:
    """The answers of a behaviour when each pair offers the same two; else None, at the first pair that does not.

    Args:
        answers: (chosen, rejected) token ids of each pair, read once.
    """
    options: list[tuple[int, ...]] = []
    preferred = []
    for chosen, rejected in answers:
        options = options or sorted({chosen, rejected})
        if len(options) != 2 or sorted((chosen, rejected)) != options or options[0][:1] == options[1][:1]:
            return None
        preferred.append(options.index(chosen))
    return NumberedAnswers(options, np.array(preferred)) if preferred else None
