"""Several alignment methods beside each other: what each taught, whom it neglected, and what it spent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.bootstrap import Statistic, percentile_bootstrap
from foretune.verification.compare import ALL, FloatArray, spearman

# What is averaged over seeds for each behaviour.
COLUMNS = ("reward_accuracy", "output_accuracy", "margin", "chosen_displacement", "divergence")


class MethodRun(NamedTuple):
    """One run of one method.

    Attributes:
        method: its name.
        seed: of the run.
        observed: rows of observed.parquet.
        divergence: the record's, {split: {behaviour: nats a token}}.
        verification: of its forecast, None where the method cannot be forecast.
    """

    method: str
    seed: int
    observed: Sequence[Mapping[str, Any]]
    divergence: Mapping[str, Mapping[str, float]]
    verification: Mapping[str, Any] | None


def compare_methods(runs: Sequence[MethodRun], distinguishability: Mapping[str, float]) -> list[dict[str, Any]]:
    """One entry a method, in the order of `runs`.

    Args:
        runs: the same data and budget; any number of seeds each.
        distinguishability: of each behaviour, in any unit; NaN where it is not defined.

    Returns:
        For each method `figures`, each with `value`, `low` and `high` (95 % bootstrap over behaviours, seeds averaged):
        reward_accuracy, output_accuracy, chosen_displacement and divergence (means over behaviours), gap (largest minus
        smallest reward accuracy), dependence (least-squares slope of margin on distinguishability, both over their
        means: 1 is proportional, 0 independent); `behaviours`: the columns of each; `order`: behaviours by margin, the
        most learned first; `forecast`: spearman_loss and margin_r2, means over seeds, or None; `seeds`;
        `seed_spread`: standard deviation over seeds of the mean reward accuracy, None for one seed.
    """
    splits = {row["split"] for run in runs for row in run.observed}
    split = "test" if "test" in splits else "train"
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        ends = [_end(run, split) for run in mine]
        names = sorted(ends[0])
        table = {column: np.array([[end[name][column] for name in names] for end in ends]) for column in COLUMNS}
        means = {column: values.mean(0) for column, values in table.items()}
        strength = np.array([distinguishability.get(name, np.nan) for name in names])
        accuracy = table["reward_accuracy"].mean(1)
        found.append(
            {
                "method": method,
                "split": split,
                "seeds": [run.seed for run in mine],
                "figures": _figures(means, strength),
                "behaviours": {
                    name: {column: float(means[column][place]) for column in COLUMNS}
                    for place, name in enumerate(names)
                },
                "order": [names[place] for place in np.argsort(-means["margin"], kind="stable")],
                "forecast": _forecast(mine),
                "seed_spread": float(accuracy.std(ddof=1)) if len(mine) > 1 else None,
            }
        )
    return found


def order_agreement(entries: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Rank correlation of the methods' orders of the behaviours, shape (methods, methods)."""
    margins = [[own["margin"] for _, own in sorted(entry["behaviours"].items())] for entry in entries]
    return [[spearman(left, right) for right in margins] for left in margins]


def _end(run: MethodRun, split: str) -> dict[str, dict[str, float]]:
    rows = [row for row in run.observed if row["split"] == split and row["behaviour"] != ALL]
    last = max(row["step"] for row in rows)
    return {
        row["behaviour"]: {**row, "divergence": run.divergence[split][row["behaviour"]]}
        for row in rows
        if row["step"] == last
    }


def _figures(means: Mapping[str, FloatArray], strength: FloatArray) -> dict[str, dict[str, float]]:
    def average(column: str) -> Callable[[NDArray[np.int64]], FloatArray]:
        return lambda drawn: means[column][drawn].mean(1)

    def gap(drawn: NDArray[np.int64]) -> FloatArray:
        return np.ptp(means["reward_accuracy"][drawn], axis=1)

    known = np.isfinite(strength)
    return {
        **{
            column: _interval(average(column), len(strength))
            for column in ("reward_accuracy", "output_accuracy", "chosen_displacement", "divergence")
        },
        "gap": _interval(gap, len(strength)),
        "dependence": _interval(
            lambda drawn: relative_slope(strength[known][drawn], means["margin"][known][drawn]), int(known.sum())
        ),
    }


def relative_slope(x: FloatArray, y: FloatArray) -> FloatArray:
    """Least-squares slope of y/mean(y) on x/mean(x) in each row, (…, n) → (…,); NaN where x is constant.

    >>> relative_slope(np.array([1.0, 2.0, 3.0]), np.array([20.0, 40.0, 60.0])).round(6)
    np.float64(1.0)
    """
    a, b = (part / part.mean(-1, keepdims=True) - 1 for part in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / (a**2).sum(-1)


def _interval(statistic: Statistic, count: int) -> dict[str, float]:
    """Of `count` behaviours; NaN below three."""
    found = percentile_bootstrap(statistic, count) if count >= 3 else (float("nan"),) * 3
    return dict(zip(("value", "low", "high"), found, strict=True))


def _forecast(runs: Sequence[MethodRun]) -> dict[str, float] | None:
    judged = [run.verification for run in runs if run.verification]
    if not judged:
        return None
    return {
        figure: float(np.mean([own[figure] for own in judged if own[figure] is not None] or [np.nan]))
        for figure in ("spearman_loss", "margin_r2")
    }
