"""`foretune what_if run/ --drop X`: what a changed run would do."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune import processes
from foretune.errors import UserError
from foretune.verbs.losses import FORECAST
from foretune.verbs.what_if import Answer, what_if


def run(arguments: Sequence[str]) -> None:
    """Parse, answer, show."""
    parser = argparse.ArgumentParser(
        "foretune what_if",
        description="Forecast a changed run from the features that `foretune forecast` left in a run folder.",
        epilog="Any argument of training can be changed as well, as in --learning_rate 1e-4 or --data_seed 7.",
    )
    parser.add_argument("output_dir", help="the run folder of a forecast of adapters or all weights")
    parser.add_argument("--drop", nargs="+", default=[], metavar="BEHAVIOUR", help="train without these behaviours")
    parser.add_argument(
        "--weight", nargs="+", default=[], metavar="BEHAVIOUR=W", help="multiply the row weights of behaviours"
    )
    parser.add_argument("--rows_per_behaviour", type=int, help="train on at most so many rows of each behaviour")
    parser.add_argument("--label_noise", type=float, default=0.0, help="share of rows whose labels are flipped")
    parser.add_argument("--objective", choices=FORECAST, help="another loss")
    parser.add_argument("--observations", type=int, default=2, help="steps, evenly spread, of which --json tells")
    parser.add_argument("--split", default="train", choices=["train", "test"], help="whose figures to show")
    parser.add_argument("--json", type=Path, help="also write the whole answer to this file")
    given, others = parser.parse_known_args(arguments)
    answer = what_if(
        given.output_dir,
        drop=given.drop,
        weight=dict(map(_weight, given.weight)),
        rows_per_behaviour=given.rows_per_behaviour,
        label_noise=given.label_noise,
        objective=given.objective,
        observations=given.observations,
        **_training_arguments(others),
    )
    if processes.is_main():
        Console().print(table(answer, split=given.split))
        if given.json:
            _write(answer, given.json)


def table(answer: Answer, *, split: str) -> Table:
    """Loss, accuracy and margin of each behaviour at the end, and how much they change; most changed first.

    Raises:
        UserError: no pair of this split was measured.
    """
    rows = [row for row in answer.rows if row["split"] == split]
    if not rows:
        raise UserError(f"the forecast measured no {split} pairs: leave out --split {split}.")
    shown = Table(
        title=f"What if: after {answer.steps[-1]} steps ({split} pairs)", title_justify="left", box=SIMPLE_HEAD
    )
    shown.add_column("behaviour", overflow="fold")
    for name in ("loss", "change", "reward acc.", "change", "margin", "change"):
        shown.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: (row["behaviour"] == "all", -abs(row["loss_change"]))):
        cells = [f"{row['loss']:.3f}", f"{row['loss_change']:+.3f}"]
        cells += [f"{row['reward_accuracy']:.0%}", f"{100 * row['reward_accuracy_change']:+.0f}"]
        cells += [f"{row['margin']:.2f}", f"{row['margin_change']:+.2f}"]
        shown.add_row(Text(row["behaviour"]), *cells)  # not markup: names may hold brackets
    return shown


def _write(answer: Answer, path: Path) -> None:
    try:
        path.write_text(json.dumps({"steps": answer.steps, "rows": answer.rows}, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"cannot write the answer to {path}: {error.strerror or error}.") from error


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--weight takes BEHAVIOUR=NUMBER, got '{text}'.") from None


def _training_arguments(words: Sequence[str]) -> dict[str, Any]:
    """`--name value` and `--name=value`; the job types the values."""
    found, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and rest:
            value = rest.pop(0)
        if not name.startswith("--") or not value or (not equals and value.startswith("--")):
            raise UserError(f"cannot read '{name}': arguments are --name value.")
        found[name[2:].replace("-", "_")] = value
    return found
