"""The page of a comparison of methods, `comparison.html`, and the same figures for the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from foretune.errors import UserError
from foretune.records import RunFolder
from foretune.report.figure_parts import Figure, colours, short
from foretune.report.folder import Row, clean, read_folder
from foretune.report.html import environment, self_contained, write_page
from foretune.report.tables import footer_rows, number

# (figure, heading, how to read it)
COLUMNS = (
    ("reward_accuracy", "reward accuracy", "share of pairs whose margin grew; mean over behaviours"),
    ("output_accuracy", "output accuracy", "share of pairs whose chosen answer is the likelier one"),
    ("gap", "gap", "reward accuracy of the best learned behaviour minus that of the worst"),
    (
        "chosen_displacement",
        "chosen answers",
        "change of the chosen answers' log-probability (nats, summed over tokens); below 0 they fell",
    ),
    ("divergence", "KL spent", "KL of the trained model to the reference at the data's responses, nats a token"),
    (
        "dependence",
        "dependence on distinguishability",
        "slope of the margin on distinguishability, both over their means: 1 is proportional, 0 independent",
    ),
)


def build_comparison(run_dir: Path | str) -> Path:
    """Write `comparison.html` into a run folder that holds comparison.json, and return its path.

    Raises:
        UserError: The folder holds no comparison.
    """
    folder, content = read_folder(run_dir), _content(run_dir)
    drawn = {figure.name: figure for figure in (_accuracies(content), _dependence(content))}
    text = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            **self_contained(drawn),
            rows=_rows(content),
            columns=COLUMNS,
            orders=[(entry["method"], entry["order"]) for entry in content["methods"]],
            agreement=content["order_agreement"],
            split=content["methods"][0]["split"],
            record=folder.record,
            footer=footer_rows(folder),
        )
    )
    return write_page(folder.path / "comparison.html", text)


def print_comparison(run_dir: Path | str, console: Console | None = None) -> None:
    """One line a method."""
    content = _content(run_dir)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("method", *(heading for _, heading, _ in COLUMNS), "forecast"):
        table.add_column(heading, overflow="fold")
    for row in _rows(content):
        table.add_row(row["method"], *row["figures"], row["forecast"])
    (console or Console()).print(table)


def _content(run_dir: Path | str) -> Row:
    content = RunFolder(run_dir).read_json("comparison.json")
    if not content:
        raise UserError(f"{run_dir} holds no comparison: run `foretune compare --output_dir {run_dir}` first.")
    return clean(content)


def _rows(content: Row) -> list[Row]:
    rows = []
    for entry in content["methods"]:
        forecast = entry["forecast"]
        words = (
            f"order {number(forecast['spearman_loss'], 2)}, margins R² {number(forecast['margin_r2'], 2)}"
            if forecast
            else "not forecast"
        )
        rows.append(
            {
                "method": entry["method"],
                "seeds": len(entry["seeds"]),
                "spread": entry["seed_spread"],
                "figures": [_words(entry["figures"][name]) for name, _, _ in COLUMNS],
                "forecast": words,
                "reason": entry["not_forecast_because"],
            }
        )
    return rows


def _words(figure: Row) -> str:
    if figure["value"] is None:
        return "–"
    return f"{number(figure['value'], 2)} ({number(figure['low'], 2)} to {number(figure['high'], 2)})"


def _accuracies(content: Row) -> Figure:
    """Each method's reward accuracy of each behaviour, the most distinguishable on the left."""
    strength = content["distinguishability"]
    names = sorted(content["methods"][0]["behaviours"], key=lambda name: -(strength.get(name) or 0.0))
    tints = colours(len(content["methods"]))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": entry["method"],
            "x": [short(name) for name in names],
            "y": [entry["behaviours"][name]["reward_accuracy"] for name in names],
            "line": {"color": tint, "width": 1.5},
            "marker": {"color": tint, "size": 7},
        }
        for entry, tint in zip(content["methods"], tints, strict=True)
    ]
    return Figure(
        "accuracies",
        traces,
        _layout({"tickangle": -40}, "reward accuracy", height=460, below=120),
        "Reward accuracy of each behaviour by method, the most distinguishable behaviour on the left.",
    )


def _dependence(content: Row) -> Figure:
    """Margin over the method's mean against distinguishability."""
    strength, traces = content["distinguishability"], []
    for entry, tint in zip(content["methods"], colours(len(content["methods"])), strict=True):
        names = [name for name in entry["behaviours"] if strength.get(name) is not None]
        margins = [entry["behaviours"][name]["margin"] for name in names]
        mean = sum(margins) / len(margins) if margins else 1.0
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": entry["method"],
                "x": [strength[name] for name in names],
                "y": [margin / mean if mean else None for margin in margins],
                "text": [short(name, 60) for name in names],
                "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}",
                "marker": {"color": tint, "size": 8},
            }
        )
    return Figure(
        "dependence",
        traces,
        _layout({"title": {"text": "distinguishability"}}, "final margin over the method's mean", height=400, below=48),
        "Final mean margin of each behaviour, over the method's mean, against its distinguishability.",
    )


def _layout(x: Row, y: str, *, height: int, below: int) -> Row:
    """Of a figure with a legend above it."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 12, "t": 12, "b": below},
        "xaxis": {"automargin": True, **x},
        "yaxis": {"title": {"text": y}, "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
