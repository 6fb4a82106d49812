"""R11: the scaling law of the follow-up: more behaviours together, smaller margins, more test errors."""

from typing import NamedTuple

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import (
    FOLLOW_UP,
    OURS,
    Check,
    Claim,
    Estimate,
    Evidence,
    NotApplicable,
    Plot,
    Series,
    above,
    near,
)
from foretune.claims.priority import joint_path
from foretune.claims.study import MIN_BEHAVIOURS, Behaviour, Study, features
from foretune.dynamics.closed_form import second_order_weights
from foretune.objectives import DPO

TOGETHER = (1, 2, 4, 8, 16)
GROUPS = 12
SETTING = last_layer.Setting(0.1, 0.01, 100)


class Cell(NamedTuple):
    """One group of K behaviours with n rows each: what happened, and what the second-order closed form says.

    Attributes:
        num_behaviours: K.
        rows: n, of each behaviour.
        margin: mean margin of the training rows at the end.
        error: share of held-out rows whose margin is not positive.
        forecast_margin: the closed form's.
        forecast_error: the closed form's.
        adam_margin: what Adam does in as many steps, as in the follow-up's code.
        adam_error: the same.
    """

    num_behaviours: int
    rows: int
    margin: float
    error: float
    forecast_margin: float
    forecast_error: float
    adam_margin: float
    adam_error: float


def run(study: Study) -> Evidence:
    """Random groups of K = 1, 2, 4, 8, 16 behaviours with n rows each, trained together."""
    behaviours = study.at_least(MIN_BEHAVIOURS)
    if not all(len(item.test_sign) for item in behaviours):
        raise NotApplicable("no rows are held out, so there is no test error")
    most = min(len(item.sign) for item in behaviours) // 2 * 2
    sizes = sorted({rows for rows in (10, 20, 40, 80, 160) if rows < most} | {most})
    cells = _cells(behaviours, [count for count in TOGETHER if count <= len(behaviours)], sizes)
    full = [cell for cell in cells if cell.rows == most]
    checks = [
        Check(
            "slope of log margin on log K (−1: margins grow as 1/K)", _fits(full, "margin"), near(-1, 0.25), FOLLOW_UP
        ),
        Check("rise of the test error with each doubling of K", _fits(full, "error", log=False), above(0.0), FOLLOW_UP),
        Check("slope of log margin on log K, forecast", _fits(full, "forecast_margin"), source=OURS),
        Check(
            "change of the test error with each doubling of rows per behaviour, K held fixed",
            _surface(cells),
            source=OURS,
        ),
        Check(
            "margins: mean relative distance of the forecast (second-order closed form)",
            Estimate.exact(float(np.mean([abs(cell.forecast_margin / cell.margin - 1) for cell in cells]))),
            source=OURS,
        ),
        Check(
            "test errors: mean distance of the forecast",
            Estimate.exact(float(np.mean([abs(cell.forecast_error - cell.error) for cell in cells]))),
            source=OURS,
        ),
    ]
    checks += [
        Check("control, Adam (the follow-up's code): slope of log margin on log K", _fits(full, "adam_margin")),
        Check("control, Adam: rise of the test error with each doubling of K", _fits(full, "adam_error", log=False)),
    ]
    plots = [_plot(cells, "margin", sizes), _plot(cells, "error", sizes)]
    words = {"setting": SETTING.words, "K": sorted({cell.num_behaviours for cell in cells}), "rows of each": sizes}
    notes = [
        "The follow-up assumes clusters that are orthogonal to each other. Where behaviours share directions, one "
        "helps another and margins fall more slowly than 1/K."
    ]
    return Evidence(checks, plots, last_layer.SETTINGS | words, notes)


def _cells(behaviours: list[Behaviour], counts: list[int], sizes: list[int]) -> list[Cell]:
    generator, cells = np.random.default_rng(0), []
    for count in counts:
        for _ in range(GROUPS if count < len(behaviours) else 1):
            group = [behaviours[index] for index in generator.choice(len(behaviours), count, replace=False)]
            cells += [_cell([item.first(rows) for item in group], rows) for rows in sizes]
    return cells


def _cell(group: list[Behaviour], rows: int) -> Cell:
    path = joint_path(group, SETTING)[-1]
    phi = np.concatenate([item.phi for item in group])
    time = np.array([SETTING.learning_rate * SETTING.steps])
    forecast = second_order_weights(time, phi, DPO(beta=SETTING.beta))[0]
    found = []
    for weights in (path, forecast, last_layer.adam_path(phi)[-1]):
        errors = [
            1 - float(last_layer.accuracy(features(item.test_states, item.test_sign) @ weights)) for item in group
        ]
        found += [float((phi @ weights).mean()), float(np.mean(errors))]
    return Cell(len(group), rows, *found)


def _fits(cells: list[Cell], what: str, *, log: bool = True) -> Estimate:
    """Slope of a cell's log value on log K, or (`log` False) of its value on log₂ K."""
    count = np.array([cell.num_behaviours for cell in cells], dtype=float)
    values = np.array([getattr(cell, what) for cell in cells])
    return _slope([np.log(count)], np.log(np.maximum(values, 1e-12))) if log else _slope([np.log2(count)], values)


def _surface(cells: list[Cell]) -> Estimate:
    """Slope of the error on log₂ rows with log₂ K beside it."""
    columns = [np.log2([cell.rows for cell in cells]), np.log2([cell.num_behaviours for cell in cells])]
    return _slope(columns, np.array([cell.error for cell in cells]))


def _slope(columns: list[np.ndarray], target: np.ndarray, *, draws: int = 1000) -> Estimate:
    """Least-squares coefficient of the first column with an intercept; 95 % bootstrap of the rows."""
    table = np.column_stack([*columns, np.ones(len(target))])

    def fit(rows: np.ndarray) -> float:
        return float(np.linalg.lstsq(table[rows], target[rows], rcond=None)[0][0])

    generator, count = np.random.default_rng(0), len(target)
    drawn = [fit(generator.integers(count, size=count)) for _ in range(draws)]
    return Estimate(fit(np.arange(count)), *map(float, np.percentile(drawn, [2.5, 97.5])))


def _plot(cells: list[Cell], what: str, sizes: list[int]) -> Plot:
    counts = sorted({cell.num_behaviours for cell in cells})

    def means(name: str, rows: int) -> list[float]:
        return [
            float(np.mean([getattr(cell, name) for cell in cells if (cell.num_behaviours, cell.rows) == (count, rows)]))
            for count in counts
        ]

    series = []
    for rows in sizes:
        series.append(Series(f"{rows} rows each", counts, means(what, rows), mode="lines+markers"))
        series.append(
            Series(f"{rows} rows each, forecast", counts, means(f"forecast_{what}", rows), mode="lines", dashed=True)
        )
    if what == "margin":
        first = means("margin", sizes[-1])[0]
        series.append(Series("1/K", counts, [first / count for count in counts], mode="lines", dashed=True))
        return Plot(
            "behaviours together, K", "mean margin", series, "Margins after as many steps, beside 1/K.", log=True
        )
    return Plot("behaviours together, K", "test error", series, "Held-out pairs that training moved the wrong way.")


CLAIM = Claim(
    "R11",
    "More behaviours together: smaller margins, more errors",
    "Trained together with K − 1 others for as many steps, a behaviour's margin grows as 1/K and its test error rises "
    "with K.",
    FOLLOW_UP,
    run,
)
