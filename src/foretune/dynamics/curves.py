"""Curves: what margins and log-probabilities at some steps mean per behaviour and split."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foretune.objectives import Objective
from foretune.objectives.base import FloatArray

ALL = "all"


def curve_rows(
    steps: Sequence[int],
    margins: FloatArray,
    behaviour_of: np.ndarray,
    split_of: np.ndarray,
    objective: Objective,
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
        objective: the loss.
        reference_margin: log π_ref(chosen) − log π_ref(rejected), shape (n,).
        reference_free: the loss sees log π(chosen) − log π(rejected) itself, not against the reference.
        also: further columns whose means are wanted, each of shape (T, n).
        weights: row weights; losses are weighted means, accuracies and margins count every pair once.

    Returns:
        loss; reward_accuracy (share of margins > 0, an exact 0 counts as not learned); output_accuracy (share of pairs
        whose chosen response the model itself finds likelier); margin (mean); num_pairs.
    """
    rows = []
    losses = objective.value(margins + reference_margin if reference_free else margins)
    for split in np.unique(split_of):
        in_split = split_of == split
        for behaviour in [*np.unique(behaviour_of[in_split]), ALL]:
            members = in_split if behaviour == ALL else in_split & (behaviour_of == behaviour)
            share = weights[members] / weights[members].sum() if weights[members].sum() else None
            for index, step in enumerate(steps):
                rows.append(
                    {
                        "behaviour": str(behaviour),
                        "split": str(split),
                        "step": int(step),
                        "loss": float(np.average(losses[index, members], weights=share)),
                        "reward_accuracy": float((margins[index, members] > 0).mean()),
                        "output_accuracy": float((reference_margin + margins[index] > 0)[members].mean()),
                        "margin": float(margins[index, members].mean()),
                        "num_pairs": int(members.sum()),
                        **{name: float(values[index, members].mean()) for name, values in (also or {}).items()},
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
