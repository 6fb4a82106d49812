"""The curves over the steps of training: the behaviours, and how long the forecast held."""

from foretune.report.figure_parts import GREY, Figure, colours, short
from foretune.report.folder import ALL, Row, RunFolder, curve
from foretune.report.verdicts import BehaviourVerdict

METRICS = {
    "loss": "loss",
    "reward_accuracy": "reward accuracy",
    "output_accuracy": "output accuracy",
    "margin": "margin",
}
MAX_POINTS = 150


def curves_figure(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> Figure | None:
    """Forecast (dashed) and observed (solid) over the steps; the buttons' data are in `extra`."""
    if not folder.forecast and not folder.observed:
        return None
    names = [item.behaviour for item in verdicts]
    shown = list(zip(names, colours(len(names)), strict=True))
    if ALL not in names and len(names) > 1:
        shown.append((ALL, GREY))
    kinds = ["band"] if any(row.get("loss_low") is not None for row in folder.forecast) else []
    kinds += [kind for kind in ("forecast", "observed") if getattr(folder, kind)]
    keys = [(name, colour, kind) for name, colour in shown for kind in kinds]
    splits = _splits(folder)
    series = {split: [_series(folder, name, kind, split) for name, _, kind in keys] for split in splits}
    metrics = [m for m in METRICS if any(line[m] for lines in series.values() for line in lines if m in line)]
    if not metrics:
        return None
    start, legend_kind = series[splits[0]], "observed" if folder.observed else "forecast"
    traces = [
        _curve_trace(key, line, metrics[0], is_in_legend=key[2] == legend_kind)
        for key, line in zip(keys, start, strict=True)
    ]
    layout = {
        "height": 470,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "xaxis": {"title": {"text": "training step"}, "zeroline": False},
        "yaxis": {"title": {"text": METRICS[metrics[0]]}, "zeroline": False},
        "legend": {"font": {"size": 11}, "itemwidth": 30},
        "hovermode": "closest",
    }
    extra = {"series": series, "metrics": {key: METRICS[key] for key in metrics}, "splits": splits}
    extra["names"] = [name if name != ALL or ALL in names else "all pairs" for name, _ in shown]
    alt = "Line chart over the training steps, one colour per behaviour: forecast dashed, observed solid."
    return Figure("curves", traces, layout, alt, extra)


def _splits(folder: RunFolder) -> list[str]:
    present = {row["split"] for row in folder.forecast + folder.observed}
    return [folder.split, *sorted(present - {folder.split})]


def _series(folder: RunFolder, name: str, kind: str, split: str) -> Row:
    """The points of one line, thinned: the steps as `x` and one list per metric; of a band its outline."""
    if kind == "band":
        points = _points(folder.forecast, name, split)
        line: Row = {"x": [row["step"] for row in points + points[::-1]]}
        for metric in METRICS:
            values = [row.get(f"{metric}_low") for row in points] + [row.get(f"{metric}_high") for row in points[::-1]]
            if any(value is not None for value in values):
                line[metric] = [_rounded(value) for value in values]
        return line
    points = _points(getattr(folder, kind), name, split)
    line = {"x": [row["step"] for row in points]}
    for metric in METRICS:
        values = [row.get(metric) for row in points]
        if any(value is not None for value in values):
            line[metric] = [_rounded(value) for value in values]
    return line


def _points(rows: list[Row], name: str, split: str) -> list[Row]:
    points = curve(rows, name, split) or curve(rows, name, split, trained_on="alone")
    if len(points) > MAX_POINTS:
        last = len(points) - 1
        points = [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    return points


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _curve_trace(key: tuple[str, str, str], line: Row, metric: str, *, is_in_legend: bool) -> Row:
    name, colour, kind = key
    label = "all pairs" if name == ALL else name
    if kind == "band":  # the page shows it when the behaviour is singled out
        return {
            "type": "scatter",
            "mode": "lines",
            "x": line["x"],
            "y": line.get(metric, []),
            "fill": "toself",
            "fillcolor": f"{colour}2e",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "legendgroup": label,
            "showlegend": False,
            "opacity": 0,
        }
    return {
        "type": "scatter",
        "mode": "lines",
        "x": line["x"],
        "y": line.get(metric, []),
        "name": short(label),
        "legendgroup": label,
        "showlegend": is_in_legend,
        "line": {"color": colour, "width": 3 if name == ALL else 2, "dash": "dash" if kind == "forecast" else "solid"},
        "hovertemplate": f"{short(label, 60)}<br>{kind}, step %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def agreement_figure(folder: RunFolder) -> Figure | None:
    """How long the forecast held: the rank correlations at each step that was compared."""
    rows = sorted(folder.verification.get("over_run") or [], key=lambda row: row.get("step") or 0)
    names = {"spearman_loss": "order of the losses", "spearman_accuracy": "order of the accuracies"}
    lines = {key: [row.get(key) for row in rows] for key in names}
    lines = {key: values for key, values in lines.items() if sum(value is not None for value in values) > 1}
    if not lines:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [row.get("step") for row in rows],
            "y": values,
            "name": names[key],
            "line": {"color": colour, "width": 2},
            "hovertemplate": f"{names[key]}, step %{{x}}: %{{y:.2f}}<extra></extra>",
        }
        for (key, values), colour in zip(lines.items(), colours(2), strict=False)
    ]
    lowest = min(value for values in lines.values() for value in values if value is not None)
    layout = {
        "height": 280,
        "margin": {"l": 56, "r": 16, "t": 36, "b": 44},
        "xaxis": {"title": {"text": "training step"}, "zeroline": False},
        "yaxis": {"title": {"text": "rank correlation"}, "range": [min(0.0, lowest) - 0.05, 1.05]},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "showlegend": True,
    }
    alt = f"Line chart over the steps; the lowest rank correlation of forecast and outcome is {lowest:.2f}."
    return Figure("agreement", traces, layout, alt)
