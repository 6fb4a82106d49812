"""`foretune reward`: a reward model, forecast beside outcome."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.cli.finish import finish
from foretune.records import RunFolder
from foretune.verbs.progress import Progress
from foretune.verbs.reward import reward
from foretune.verbs.reward_job import parse_reward_job


def run(arguments: Sequence[str]) -> None:
    """Parse, forecast, train, report."""
    job = parse_reward_job(arguments, prog="foretune reward")
    folder = reward(job, progress=Progress())
    finish(folder)
    if job.ours.ensemble:
        Console().print(ensemble_table(folder))


def ensemble_table(folder: RunFolder) -> Table:
    """Mean and spread of the members on the held-out pairs of each behaviour, or the training pairs without them."""
    stored = folder.read_table("ensemble")
    assert stored is not None
    rows = stored.to_pylist()
    split = "test" if any(row["split"] == "test" for row in rows) else "train"
    shown = Table(title=f"Ensemble of {rows[0]['members']} ({split} pairs)", title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("behaviour", overflow="fold")
    for name in ("accuracy", "±", "margin", "±", "agreement"):
        shown.add_column(name, justify="right")
    for row in rows:
        if row["split"] == split:
            cells = [f"{row['reward_accuracy']:.0%}", f"{row['reward_accuracy_spread']:.1%}"]
            cells += [f"{row['margin']:.2f}", f"{row['margin_spread']:.2f}", f"{row['agreement']:.0%}"]
            shown.add_row(Text(row["behaviour"]), *cells)
    return shown
