"""Curves: what margins and log-probabilities at some steps mean per behaviour and split."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foretune.objectives import LossOfPairs, RankingLoss, SidedLoss
from foretune.objectives.base import FloatArray
from foretune.objectives.contrasts import OrderedPairs

ALL = "all"


def curve_rows(
    steps: Sequence[int],
    margins: FloatArray,
    behaviour_of: np.ndarray,
    split_of: np.ndarray,
    objective: LossOfPairs,
    *,
    reference_margin: FloatArray,
    weights: FloatArray,
    reference_free: bool = False,
    also: Mapping[str, FloatArray] | None = None,
) -> list[dict[str, Any]]:
    """Rows of forecast.parquet or observed.parquet: one a behaviour (and "all"), split and step.

    Args:
        steps: optimiser steps, shape (T,).
        margins: log-ratio of chosen over rejected against the reference at each step, shape (T, n).
        behaviour_of: shape (n,).
        split_of: shape (n,).
        objective: the loss; of rankings, whose contrasts the n pairs are, the figures are means over all pairs of a
            ranking that are not tied, then over rankings; a sided one needs `chosen_displacement` in `also`.
        reference_margin: log π_ref(chosen) − log π_ref(rejected), shape (n,).
        reference_free: the loss sees log π(chosen) − log π(rejected) itself, not against the reference.
        also: further columns whose means are wanted, each of shape (T, n); of rankings those of the two sides,
            `chosen_…` and `rejected_…`.
        weights: row weights; losses are weighted means, accuracies and margins count every pair once.

    Returns:
        loss; reward_accuracy (share of margins > 0, an exact 0 counts as not learned); output_accuracy (share of pairs
        whose chosen response the model itself finds likelier); margin (mean); num_pairs (of rankings, their number).
    """
    if isinstance(objective, RankingLoss):
        pairs = objective.contrasts.ordered()
        first = objective.contrasts.members[pairs.ranking, 0]
        return _rows(
            steps,
            objective.value(margins)[:, pairs.ranking],
            pairs.margins(margins),
            pairs.margins(reference_margin),
            behaviour_of[first],
            split_of[first],
            weights[first] * pairs.share,
            _sides(pairs, first, also or {}),
            pairs.share,
        )
    groups = behaviour_of, split_of
    if isinstance(objective, SidedLoss):
        losses = objective.value(margins, (also or {})["chosen_displacement"])
    else:
        losses = objective.value(margins + reference_margin if reference_free else margins)
    return _rows(steps, losses, margins, reference_margin, *groups, weights, also or {}, None)


def _sides(pairs: OrderedPairs, first: np.ndarray, also: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Columns of contrasts at the better and the worse response of each pair."""
    found = {}
    for name, values in also.items():
        kind = name.removeprefix("chosen_")
        if kind != name:
            found[name] = values[:, pairs.better]
            found[f"rejected_{kind}"] = pairs.of_worse(values, also[f"rejected_{kind}"][:, first])
    return found


def _rows(
    steps: Sequence[int],
    losses: FloatArray,
    margins: FloatArray,
    reference_margin: FloatArray,
    behaviour_of: np.ndarray,
    split_of: np.ndarray,
    weights: FloatArray,
    also: Mapping[str, FloatArray],
    counts: FloatArray | None,
) -> list[dict[str, Any]]:
    """The same of pairs whose losses are known; `counts`: how much of a row each pair is, None: a whole one."""
    rows = []
    for split in np.unique(split_of):
        in_split = split_of == split
        for behaviour in [*np.unique(behaviour_of[in_split]), ALL]:
            members = in_split if behaviour == ALL else in_split & (behaviour_of == behaviour)
            own = None if counts is None else counts[members]
            share = weights[members] / weights[members].sum() if weights[members].sum() else None
            for index, step in enumerate(steps):
                rows.append(
                    {
                        "behaviour": str(behaviour),
                        "split": str(split),
                        "step": int(step),
                        "loss": float(np.average(losses[index, members], weights=share)),
                        "reward_accuracy": float(np.average(margins[index, members] > 0, weights=own)),
                        "output_accuracy": float(
                            np.average((reference_margin + margins[index] > 0)[members], weights=own)
                        ),
                        "margin": float(np.average(margins[index, members], weights=own)),
                        "num_pairs": int(members.sum() if own is None else round(own.sum())),
                        **{
                            name: float(np.average(values[index, members], weights=own))
                            for name, values in also.items()
                        },
                    }
                )
    return rows


def learning_order(rows: Sequence[dict[str, Any]], *, split: str) -> list[str]:
    """Behaviours by their loss averaged over the curve, lowest (learned first) first."""
    areas: dict[str, list[float]] = {}
    for row in rows:
        if row["split"] == split and row["behaviour"] != ALL:
            areas.setdefault(row["behaviour"], []).append(row["loss"])
    return sorted(areas, key=lambda behaviour: (float(np.mean(areas[behaviour])), behaviour))


def observation_steps(total_steps: int, count: int) -> list[int]:
    """About `count` steps from 0 to the last, evenly spread, without repeats.

    >>> observation_steps(10, 5)
    [0, 2, 5, 8, 10]
    """
    return sorted({round(float(step)) for step in np.linspace(0, total_steps, max(count, 2))})
