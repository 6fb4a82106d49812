"""How well a forecast described a run: order, sizes, and where it was wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from foretune.errors import UserError

FloatArray = NDArray[np.float64]
ALL = "all"
FIGURES = ("spearman_loss", "spearman_accuracy", "margin_r2", "margin_slope")


@dataclass(frozen=True)
class Verification:
    """Figures of verification.json.

    Attributes:
        spearman_loss: rank correlation of forecast and observed loss over behaviours at the last common step.
        spearman_accuracy: the same of reward accuracy.
        margin_r2: squared correlation of forecast and observed margins over pairs at that step.
        margin_slope: observed margin per forecast margin (least squares through the means); 1 is right, more: the run
            went further than forecast.
        loss_mae: mean absolute error of the behaviours' loss curves, over all common steps after the first.
        relative_loss_error: that error over the mean absolute change of the observed losses at the last step.
        split: whose curves were compared.
        step: the last common step.
        num_behaviours: behaviours compared.
        num_pairs: pairs compared.
        intervals: 95 % bootstrap interval of each of the first four figures: over behaviours, pairs within them.
        over_run: the figures at each common step.
        behaviours: forecast and observed loss and rank of each behaviour at the last step.
        sentence: where the forecast was wrong, in words.
        caveats: what limits these figures.
    """

    spearman_loss: float
    spearman_accuracy: float
    margin_r2: float
    margin_slope: float
    loss_mae: float
    relative_loss_error: float
    split: str
    step: int
    num_behaviours: int
    num_pairs: int
    intervals: dict[str, tuple[float, float]]
    over_run: list[dict[str, float]]
    behaviours: list[dict[str, Any]]
    sentence: str
    caveats: list[str]

    def as_json(self) -> dict[str, Any]:
        """The content of verification.json: intervals become `{figure}_low` and `{figure}_high`."""
        content = asdict(self)
        for figure, (low, high) in content.pop("intervals").items():
            content |= {f"{figure}_low": low, f"{figure}_high": high}
        return content


def compare(
    forecast: Sequence[Mapping[str, Any]],
    observed: Sequence[Mapping[str, Any]],
    forecast_pairs: Mapping[str, NDArray],
    observed_pairs: Mapping[str, NDArray],
    behaviour_of: Mapping[int, str],
    *,
    split: str = "train",
    after: int = 0,
    draws: int = 1000,
    seed: int = 0,
    caveats: Sequence[str] = (),
) -> Verification:
    """Compare the joint simulated run with what was observed.

    Args:
        forecast: rows of forecast.parquet.
        observed: rows of observed.parquet.
        forecast_pairs: pair_id (n,), steps (T,) and margins (T, n).
        observed_pairs: the same of the run.
        behaviour_of: each pair's behaviour; pairs that are missing are left out.
        split: whose curves to compare.
        after: the last step that was known to the forecast (of a pilot, or 0).
        draws: bootstrap draws of the intervals.
        seed: of the bootstrap.
        caveats: sentences to pass on.

    Raises:
        UserError: no common step after `after`, or no common pair.
    """
    said = _curves(
        [row for row in forecast if (row["method"], row["trained_on"]) == ("simulated_run", "mixture")], split
    )
    happened = _curves(observed, split)
    if not said and not happened:
        raise UserError(
            f"forecast and run have no rows of split '{split}': compare the other split, or hold rows out "
            "(--test_fraction 0.2) before the forecast."
        )
    steps = [step for step in sorted(set(said) & set(happened)) if step > after] if 0 in said and 0 in happened else []
    names = sorted(set.intersection(*(set(said[step]) & set(happened[step]) for step in steps))) if steps else []
    if not names:
        raise UserError(
            "forecast and run have no step in common besides the start: run both with the same settings, then verify."
        )
    margins, owner = _paired_margins(forecast_pairs, observed_pairs, behaviour_of)
    last = steps[-1]
    over_run = [
        {
            "step": step,
            **_figures(said[step], happened[step], names, margins[step]),
            "loss_mae": _mae(said, happened, names, [step]),
        }
        for step in steps
    ]
    changes = [abs(happened[last][name]["loss"] - happened[0][name]["loss"]) for name in names]
    mae = _mae(said, happened, names, steps)
    behaviours = _behaviour_rows(said[last], happened[last], names)
    end = {figure: over_run[-1][figure] for figure in FIGURES}
    return Verification(
        **end,
        loss_mae=mae,
        relative_loss_error=mae / float(np.mean(changes)) if np.mean(changes) else float("nan"),
        split=split,
        step=last,
        num_behaviours=len(names),
        num_pairs=len(owner),
        intervals=_intervals(said[last], happened[last], names, margins[last], owner, draws, seed),
        over_run=over_run,
        behaviours=behaviours,
        sentence=_sentence(end, behaviours, _wrong_way(said, happened, names, last)),
        caveats=list(caveats),
    )


def judge_revisions(
    revisions: Sequence[Mapping[str, Any]], observed: Sequence[Mapping[str, Any]], *, split: str
) -> list[dict[str, float]]:
    """How right the forecasts of the end were that were made while the run trained.

    Args:
        revisions: the record's section.
        observed: rows of observed.parquet.
        split: whose losses to compare.

    Returns:
        For each revision: the step it was made at, spearman_loss and loss_mae of the behaviours at the run's end.
    """
    curves = _curves(observed, split)
    last = curves[max(curves)]
    found = []
    for revision in revisions:
        said = {row["behaviour"]: row["loss"] for row in revision["end"] if row["split"] == split}
        names = sorted(set(said) & set(last))
        ours, theirs = [said[name] for name in names], [last[name]["loss"] for name in names]
        error = float(np.abs(np.subtract(ours, theirs)).mean())
        found.append({"step": revision["step"], "spearman_loss": spearman(ours, theirs), "loss_mae": error})
    return found


def _curves(rows: Sequence[Mapping[str, Any]], split: str) -> dict[int, dict[str, Mapping[str, Any]]]:
    curves: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["split"] == split and row["behaviour"] != ALL:
            curves.setdefault(row["step"], {})[row["behaviour"]] = row
    return curves


def _paired_margins(
    forecast: Mapping[str, NDArray], observed: Mapping[str, NDArray], behaviour_of: Mapping[int, str]
) -> tuple[dict[int, FloatArray], list[str]]:
    """Margins of common pairs at common steps, {step: (2, n)}, and each pair's behaviour."""
    place = {int(pair): index for index, pair in enumerate(observed["pair_id"])}
    common = [int(pair) for pair in forecast["pair_id"] if int(pair) in place and int(pair) in behaviour_of]
    if not common:
        raise UserError("forecast and run have no pair in common: run both with the same data, then verify again.")
    first = {int(pair): index for index, pair in enumerate(forecast["pair_id"])}
    left, right = [first[pair] for pair in common], [place[pair] for pair in common]
    steps = {int(step): index for index, step in enumerate(observed["steps"])}
    margins = {
        int(step): np.stack([forecast["margins"][index][left], observed["margins"][steps[int(step)]][right]])
        for index, step in enumerate(forecast["steps"])
        if int(step) in steps
    }
    return margins, [behaviour_of[pair] for pair in common]


def _figures(
    said: Mapping[str, Any], happened: Mapping[str, Any], names: Sequence[str], margins: FloatArray
) -> dict[str, float]:
    return {
        "spearman_loss": spearman([said[n]["loss"] for n in names], [happened[n]["loss"] for n in names]),
        "spearman_accuracy": spearman(
            [said[n]["reward_accuracy"] for n in names], [happened[n]["reward_accuracy"] for n in names]
        ),
        **dict(zip(("margin_r2", "margin_slope"), margin_fit(*margins), strict=True)),
    }


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation, ties by mean rank; NaN with fewer than three values or where one side is constant.

    >>> spearman([1, 2, 3], [10, 20, 30])
    1.0
    """
    if len(left) < 3:
        return float("nan")
    ranks = np.stack([rankdata(left), rankdata(right)])
    spread = ranks.std(1)
    if not spread.all():
        return float("nan")
    return float(np.round(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / spread.prod(), 12))


def margin_fit(forecast: FloatArray, observed: FloatArray) -> tuple[float, float]:
    """(squared correlation, slope) of observed over forecast margins; NaN where one side is constant.

    >>> margin_fit(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 4.0]))
    (1.0, 2.0)
    """
    left, right = forecast - forecast.mean(), observed - observed.mean()
    variance, total = float(left @ left), float(right @ right)
    if not variance or not total:
        return float("nan"), float("nan")
    product = float(left @ right)
    return product**2 / (variance * total), product / variance


def _mae(said: Any, happened: Any, names: Sequence[str], steps: Sequence[int]) -> float:
    return float(np.mean([abs(said[s][n]["loss"] - happened[s][n]["loss"]) for s in steps for n in names]))


def _intervals(
    said: Mapping[str, Any],
    happened: Mapping[str, Any],
    names: Sequence[str],
    margins: FloatArray,
    owner: Sequence[str],
    draws: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over behaviours; a drawn behaviour brings all of its pairs along."""
    generator = np.random.default_rng(seed)
    members = {name: np.flatnonzero(np.array(owner) == name) for name in names}
    found = []
    for _ in range(draws):
        drawn = [names[int(index)] for index in generator.integers(len(names), size=len(names))]
        pairs = np.concatenate([members[name] for name in drawn])
        if len(pairs):
            found.append(list(_figures(said, happened, drawn, margins[:, pairs]).values()))
    with np.errstate(all="ignore"):
        return {figure: _percentiles(column) for figure, column in zip(FIGURES, np.array(found).T, strict=True)}


def _percentiles(values: FloatArray) -> tuple[float, float]:
    if not np.isfinite(values).any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _behaviour_rows(said: Mapping[str, Any], happened: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    losses = np.array([[curve[name]["loss"] for name in names] for curve in (said, happened)])
    ranks = np.stack([rankdata(row, method="ordinal") for row in losses])
    return [
        {
            "behaviour": name,
            "forecast_loss": float(losses[0, index]),
            "observed_loss": float(losses[1, index]),
            "forecast_rank": int(ranks[0, index]),
            "observed_rank": int(ranks[1, index]),
        }
        for index, name in enumerate(names)
    ]


def _wrong_way(said: Mapping[int, Any], happened: Mapping[int, Any], names: Sequence[str], last: int) -> list[str]:
    """Behaviours whose loss rose where the whole band of the forecast said fall, or the other way round."""
    found = []
    for name in names:
        end, start = said[last][name], said[0][name]["loss"]
        low, high = (end["loss"] if end.get(bound) is None else end[bound] for bound in ("loss_low", "loss_high"))
        change = happened[last][name]["loss"] - happened[0][name]["loss"]
        if change > 0 > high - start or change < 0 < low - start:
            found.append(name)
    return found


def _sentence(figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]], wrong_way: Sequence[str]) -> str:
    """The forecast's worst misses in words: order, direction, size."""
    parts = []
    if wrong_way:
        parts.append(f"the direction was wrong for {_listed(wrong_way)}")
    worst = max(rows, key=lambda row: abs(row["forecast_rank"] - row["observed_rank"]))
    gap = worst["observed_rank"] - worst["forecast_rank"]
    if abs(gap) > max(1, len(rows) // 4):
        parts.append(
            f"{worst['behaviour']} was learned {'later' if gap > 0 else 'earlier'} than forecast "
            f"(rank {worst['observed_rank']} instead of {worst['forecast_rank']} of {len(rows)})"
        )
    slope = figures["margin_slope"]
    if np.isfinite(slope) and not 0.8 <= slope <= 1.25:
        parts.append(f"margins moved {slope:.2g} times as far as forecast")
    if not parts:
        return "The forecast was right in direction, order and size."
    return "The forecast was wrong here: " + "; ".join(parts) + "."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
