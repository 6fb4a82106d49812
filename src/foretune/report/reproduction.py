"""The pages of a reproduction: `reproduction.html`, one section a claim, and the same verdicts for the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.errors import UserError
from foretune.records import RunFolder
from foretune.report.figure_parts import GREY, Figure, colours, short
from foretune.report.folder import Row, read_folder
from foretune.report.html import environment, self_contained, write_page
from foretune.report.tables import footer_rows, number
from foretune.report.terminal import STYLES

TONES = {"shown": "good", "not shown": "warn", "opposite": "bad", "not applicable": "mute"}
MEANINGS = {
    "shown": "The 95 % interval of every number lies where the claim says.",
    "not shown": "An interval reaches beyond what the claim says, in neither direction decisively.",
    "opposite": "An interval lies wholly on the other side of no effect, or one case violates what must never be.",
    "not applicable": "This model or data set cannot show the claim; the reason is given.",
}


def build_reproduction(run_dir: Path | str) -> Path:
    """Write `reproduction.html` into a run folder that holds claims.json, and return its path.

    Raises:
        UserError: The folder holds no reproduction.
    """
    folder = read_folder(run_dir)
    pages = claim_pages(folder.path)
    drawn = {figure.name: figure for page in pages for figure in page["figures"]}
    text = (
        environment()
        .get_template("reproduction.html.j2")
        .render(
            **self_contained(drawn),
            pages=pages,
            tones=TONES,
            meanings=MEANINGS,
            record=folder.record,
            counts=_counts(pages),
            footer=footer_rows(folder),
        )
    )
    return write_page(folder.path / "reproduction.html", text)


def claim_pages(run_dir: Path) -> list[Row]:
    """What claims.json says, each claim with its figures and the number that decides its verdict."""
    pages = RunFolder(run_dir).read_json("claims.json")
    if not pages:
        raise UserError(f"{run_dir} holds no reproduction: run `foretune reproduce --output_dir {run_dir}` first.")
    for page in pages:
        page["figures"] = [claim_figure(f"{page['claim']}-{place}", plot) for place, plot in enumerate(page["plots"])]
        for check in page["checks"]:
            check["words"] = estimate_words(check)
        page["deciding"] = next((check for check in page["checks"] if check["verdict"] == page["verdict"]), None)
    return pages


def estimate_words(check: Row) -> str:
    """A number and its interval, "0.92 (0.81 to 0.97)"; no interval where it is exact."""
    value, low, high = (check[name] for name in ("value", "low", "high"))
    if low is None or high is None or low == high:
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def claim_figure(name: str, plot: Row) -> Figure:
    """A plot of claims.json as a plotly specification."""
    series = plot["series"]
    groups = list(dict.fromkeys(_group(item["name"]) for item in series))
    tints = dict(zip(groups, colours(len(groups)), strict=True))
    traces = [_trace(item, tints[_group(item["name"])], labelled=len(series) > 1) for item in series]
    if plot["diagonal"]:
        values = [value for item in series for axis in ("x", "y") for value in item[axis] if value is not None]
        ends = [min(values), max(values)]
        line = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip", "showlegend": False}
        traces.append(line | {"line": {"color": GREY, "width": 1, "dash": "dot"}})
    kind = {"type": "log"} if plot["log"] else {}
    layout = {
        "height": 360 + 20 * max(0, len(series) - 1),
        "margin": {"l": 64, "r": 12, "t": 12, "b": 48},
        "xaxis": {"title": {"text": plot["x_label"]}, "automargin": True, **kind},
        "yaxis": {"title": {"text": plot["y_label"]}, "automargin": True, **kind},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
    }
    return Figure(name, traces, layout, plot["caption"])


def _group(name: str) -> str:
    """Series of one group have one colour: "a, forecast" that of "a"."""
    return name.rpartition(", ")[0] or name


def _trace(item: Row, tint: str, *, labelled: bool) -> Row:
    trace: Row = {
        "type": "scatter",
        "mode": item["mode"],
        "name": short(item["name"], 60),
        "x": item["x"],
        "y": item["y"],
        "showlegend": labelled,
        "line": {"color": tint, "width": 2, "dash": "dot" if item["dashed"] else "solid"},
        "marker": {"color": tint, "size": 8},
    }
    if item["text"]:
        trace |= {"text": [short(text, 80) for text in item["text"]], "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}"}
    return trace


def _counts(pages: list[Row]) -> list[tuple[str, int]]:
    found = [(verdict, sum(page["verdict"] == verdict for page in pages)) for verdict in TONES]
    return [(verdict, count) for verdict, count in found if count]


def print_reproduction(run_dir: Path | str, console: Console | None = None) -> None:
    """One line a claim: verdict, what it says, the number that decides."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("claim", "verdict", "what", "deciding number (95 % interval)", "wanted"):
        table.add_column(heading, overflow="fold")
    for page in claim_pages(Path(run_dir)):
        deciding = page["deciding"] or {"words": page["reason"], "wanted": ""}
        verdict = Text(page["verdict"], style=STYLES[TONES[page["verdict"]]])
        table.add_row(page["claim"], verdict, page["title"], deciding["words"], deciding["wanted"])
    (console or Console()).print(table)
