"""Names in the terminal are shown as they are, whatever they look like."""

import io

import pytest
from rich.console import Console

from foretune.cli.reward import ensemble_table
from foretune.cli.rlhf import policy_table
from foretune.records import RunFolder
from foretune.records.schema import TABLES
from foretune.verbs.progress import Progress

LIKE_MARKUP = ["[harmless]", "[/INST] style", "[bold]x[/bold] [/]", ":smile: \\[b]"]
every_name = pytest.mark.parametrize("name", LIKE_MARKUP)


def terminal(**options):
    return Console(file=io.StringIO(), width=200, **options)


def row(table, **values):
    """A row of a table with numbers for what is not said."""
    return {field.name: 1 if str(field.type) == "int64" else 0.5 for field in TABLES[table]} | values


@every_name
def test_progress_says_names_as_they_are(name):
    console = terminal()
    Progress(console).say(f"forecast: {name} alone …")
    assert console.file.getvalue() == f"forecast: {name} alone …\n"


@every_name
def test_a_bar_shows_names_as_they_are(name):
    console = terminal(force_terminal=True, color_system=None)
    with Progress(console).bar(f"measuring {name}", 2) as advance:
        advance(1)
    assert f"measuring {name}" in console.file.getvalue()


@every_name
def test_the_table_of_an_ensemble_shows_names_as_they_are(name, tmp_path):
    run, console = RunFolder(tmp_path), terminal()
    run.write_table("ensemble", [row("ensemble", behaviour=name, split="train")])
    console.print(ensemble_table(run))
    assert name in console.file.getvalue()


@every_name
def test_the_table_of_a_policy_shows_names_as_they_are(name, tmp_path):
    run, console = RunFolder(tmp_path), terminal()
    methods = ("first order", "observed")
    rows = [
        row("policy", method=method, behaviour=name, split="train", step=step) for method in methods for step in (0, 3)
    ]
    run.write_table("policy", rows)
    console.print(policy_table(run))
    assert name in console.file.getvalue()
