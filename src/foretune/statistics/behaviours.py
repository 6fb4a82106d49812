"""All statistics of all behaviours: the rows of behaviours.parquet and the behaviour kernel."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from foretune.statistics.distinguishability import distinguishability, generalised_distinguishability
from foretune.statistics.moments import FloatArray
from foretune.statistics.priority import (
    BehaviourKernel,
    behaviour_kernel,
    differences_kernel,
    initial_rates,
    priority_levels,
)
from foretune.statistics.samples import Differences, Sample, TwoClasses


class Measured(NamedTuple):
    """Features of n pairs, as plain arrays.

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
    """

    behaviour_of: np.ndarray
    split_of: np.ndarray
    weights: FloatArray
    answer: np.ndarray
    first_state: FloatArray
    chosen_mean: FloatArray
    rejected_mean: FloatArray
    sketch: FloatArray
    kernel_features: FloatArray

    def sample(self, members: np.ndarray) -> Sample:
        """The sample of one behaviour: two classes of one-token answers, or differences of responses."""
        if (self.answer[members] >= 0).all():
            return TwoClasses(self.first_state[members], self.answer[members] == 0)
        return Differences(self.chosen_mean[members], self.rejected_mean[members])


def yes_no_features(first_state: FloatArray, answer: np.ndarray) -> FloatArray:
    """φ of pairs that share two one-token answers, in fewer numbers: (e_a − e_b) ⊗ x has norm √2‖x‖ (theory T13)."""
    return np.sqrt(2.0) * np.where(answer == 0, 1.0, -1.0)[:, None] * first_state


def training_kernel(measured: Measured) -> BehaviourKernel:
    """The behaviour kernel of the training pairs, shares of weight included."""
    train = measured.split_of == "train"
    return behaviour_kernel(
        measured.kernel_features[train],
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
        members = (measured.behaviour_of == behaviour) & (measured.split_of == "train")
        if (sample := measured.sample(members)).defined:
            differences[index] = sample.coefficients() @ sample.rows
    found = priority_levels(differences_kernel(differences, kernel.weights, behaviours=kernel.behaviours))
    return np.where(np.isfinite(differences).all(1), found, np.nan)


def behaviour_rows(measured: Measured, kernel: BehaviourKernel, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """One row a behaviour and split, training split first."""
    priorities = dict(zip(kernel.behaviours, training_priorities(measured, kernel), strict=True))
    rates = dict(zip(kernel.behaviours, initial_rates(kernel), strict=True))
    rows = []
    for split in sorted(np.unique(measured.split_of), reverse=True):
        for behaviour in np.unique(measured.behaviour_of[measured.split_of == split]):
            members = (measured.split_of == split) & (measured.behaviour_of == behaviour)
            found = distinguishability(measured.sample(members), draws=draws, seed=seed)
            general, debiased = generalised_distinguishability(measured.sketch[members], measured.answer[members])
            rows.append(
                {
                    "behaviour": str(behaviour),
                    "split": str(split),
                    "num_pairs": int(members.sum()),
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
        members = np.flatnonzero((measured.behaviour_of == behaviour) & (measured.split_of == "train"))
        if len(members) and (sample := measured.sample(members)).defined:
            found[members] = sample.alignments()
    return found


def answers_of(answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[tuple[int, ...], int] | None:
    """The two answers of a behaviour, numbered, when each pair offers the same two; else None.

    Args:
        answers: (chosen, rejected) token ids of each pair.
    """
    offered = {frozenset(pair) for pair in answers}
    if len(offered) != 1 or len(options := sorted(next(iter(offered)))) != 2 or options[0][:1] == options[1][:1]:
        return None
    return {option: number for number, option in enumerate(options)}
