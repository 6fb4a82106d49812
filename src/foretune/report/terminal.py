"""The same verdicts for the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foretune.report.answer import MAX_ACTIONS, actions, answer
from foretune.report.folder import read_folder
from foretune.report.outcomes import Outcome
from foretune.report.tables import distance, number, percent, range_text
from foretune.report.verdicts import BehaviourVerdict, judge

STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "mute": "dim"}
SEVERITY_STYLES = {"high": "bold red", "medium": "yellow", "low": "cyan", "info": "dim"}


def summary(run_dir: Path | str) -> RenderableType:
    """The answer, what to do first and the table of behaviours, for a rich console."""
    folder = read_folder(run_dir)
    verdicts = judge(folder)
    parts: list[RenderableType] = [Text(" ".join(answer(folder, verdicts))), Text("")]
    if verdicts:
        parts += [_table(verdicts), Text("")]
    parts.append(Text("What to do first", style="bold"))
    for i, action in enumerate(actions(folder, verdicts)[:MAX_ACTIONS], 1):
        title = f"{action.finding}: {action.behaviour}" if action.behaviour else action.finding
        style = SEVERITY_STYLES[action.severity]
        line = Text.assemble(f"{i}. ", (f"[{action.severity}] ", style), (title, "bold"))
        line.append(f"\n   {action.evidence}\n   → {action.remedy}")
        parts.append(line)
    return Group(*parts)


def print_summary(run_dir: Path | str, console: Console | None = None) -> None:
    """Print the summary of a run folder."""
    (console or Console()).print(summary(run_dir))


def _table(verdicts: list[BehaviourVerdict]) -> Table:
    table = Table(title="Behaviours", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("behaviour", overflow="fold", min_width=14)
    table.add_column("verdict", overflow="fold", min_width=13)
    has = {name: any(getattr(item, name) for item in verdicts) for name in ("forecast", "observed")}
    headers = ["pairs", "dist.", *[f"{name}\nloss" for name in has if has[name]]]
    has_range = not has["observed"] and any(item.likely_loss for item in verdicts)
    headers += ["likely\nloss"] if has_range else []
    headers += ["reward\nacc."] if any(has.values()) else ["priority"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for item in verdicts:
        cells = [number(item.num_pairs), number(distance(item.measures)[0], 2)]
        found: list[Outcome | None] = [getattr(item, name) for name in has if has[name]]
        cells += [number(outcome.final_loss if outcome else None) for outcome in found]
        cells += [range_text(item.likely_loss) or "–"] if has_range else []
        last = found[-1] if found else None
        priority = number(item.measures.get("priority"), 2)
        cells.append(percent(last.reward_accuracy if last else None) if found else priority)
        verdict = Text(item.verdict, style=STYLES[item.tone])
        table.add_row(Text(item.behaviour), verdict, *cells)
    return table
