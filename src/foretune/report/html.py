"""The page: one self-contained HTML file that needs no network."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from foretune.report import tables
from foretune.report.answer import MAX_ACTIONS, actions, answer
from foretune.report.figure_parts import Figure
from foretune.report.figures import displacement, figures
from foretune.report.folder import RunFolder, read_folder
from foretune.report.verdicts import judge
from foretune.report.words import VERDICTS, WORDS

HERE = Path(__file__).parent


def build_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder, all at once, and return its path.

    Raises:
        UserError: The folder is not a run folder or a file in it cannot be read.
    """
    folder = read_folder(run_dir)
    page = render(folder)
    return write_page(folder.path / "report.html", page)


def write_page(target: Path, page: str) -> Path:
    """Write a page all at once, and return its path."""
    handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def render(folder: RunFolder) -> str:
    """The page as text."""
    verdicts = judge(folder)
    drawn = figures(folder, verdicts)
    columns, counts = tables.data_table(folder)
    todo = actions(folder, verdicts)
    observed, forecast = (displacement(rows, folder.split, verdicts) for rows in (folder.observed, folder.forecast))
    moved = observed or forecast
    return (
        environment()
        .get_template("template.html.j2")
        .render(
            **self_contained(drawn),
            folder=folder,
            record=folder.record,
            answer=answer(folder, verdicts),
            actions=todo[:MAX_ACTIONS],
            more_actions=todo[MAX_ACTIONS:],
            verdicts=verdicts,
            rows=tables.behaviour_rows(verdicts),
            columns=columns,
            counts=counts,
            mixture=tables.mixture_rows(folder),
            notes=_notes(folder),
            moved=moved,
            moved_really=bool(observed),
            falling=[name for name, chosen, _ in moved if chosen < 0],
            verification=tables.verification_rows(folder),
            footer=tables.footer_rows(folder),
            words=WORDS,
            sections=_sections(folder, set(drawn), bool(verdicts)),
            verdict_words=VERDICTS,
        )
    )


def self_contained(drawn: Mapping[str, Figure]) -> dict[str, object]:
    """What a page brings along: style, script, figures by name and the library that draws them."""
    return {
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),
        "js": Markup((HERE / "report.js").read_text(encoding="utf-8")),
        "plotlyjs": Markup(get_plotlyjs().replace("</script", "<\\/script")) if drawn else "",
        "specs": _embed([figure.spec() for figure in drawn.values()]),
        "figures": drawn,
    }


def environment() -> Environment:
    """Where templates are found, and how they write numbers."""
    found = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {
        "number": tables.number,
        "percent": tables.percent,
        "interval": tables.interval_text,
        "range": tables.range_text,
        "code": _code,
    }
    return found


def _code(text: str) -> Markup:
    """Escaped text in which a word between backticks is shown as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _sections(folder: RunFolder, drawn: set[str], has_behaviours: bool) -> list[tuple[str, str]]:
    """(id, name) of the sections that the page has, for its line of links."""
    known = [
        ("actions", "What to do", True),
        ("behaviours", "Behaviours", has_behaviours),
        ("curves", "Course", "curves" in drawn),
        ("verification", "Forecast right?", "scatter" in drawn or bool(tables.verification_rows(folder))),
        ("kernel", "Who helps whom", "kernel" in drawn),
        ("mixture", "Mixture", bool(tables.mixture_rows(folder))),
        ("displacement", "Chosen answers", "displacement" in drawn),
        ("pairs", "Pairs", bool(folder.pairs)),
        ("data", "Data", all(tables.data_table(folder))),
    ]
    return [(key, name) for key, name, is_there in known if is_there]


def _notes(folder: RunFolder) -> list[str]:
    """The notes that each stage left, in their order."""
    stages = [folder.record.get(stage) or {} for stage in ("data", "audit", "forecast", "train")]
    return [str(note) for stage in stages for note in stage.get("notes") or []]


def _embed(specs: list[dict[str, object]]) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(specs, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, code)
    return Markup(text)
