"""`foretune replay`: repeat a run folder and compare the numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune import processes
from foretune.cli.finish import finish
from foretune.verbs.progress import Progress
from foretune.verbs.replay import replay


def run(arguments: Sequence[str]) -> None:
    """Parse, replay, show the differences; exit code 1 where a number changed by more than the tolerance."""
    parser = argparse.ArgumentParser(
        "foretune replay", description="Repeat the verbs of a run folder from its config.yaml."
    )
    parser.add_argument("run", type=Path, help="the run folder to repeat")
    parser.add_argument("--output_dir", help="where the repetition goes (default: <run>-replay)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-6, help="largest relative difference that counts as equal"
    )
    given = parser.parse_args(arguments)
    target = given.output_dir or f"{str(given.run).rstrip('/')}-replay"
    folder, differences = replay(given.run, target, progress=Progress())
    if folder.stage_key("rlhf") is None:  # a policy's run has no report
        finish(folder)
    if not processes.is_main():
        return
    table = Table("table", "column", "largest relative difference")
    for (name, column), difference in sorted(differences.items(), key=lambda item: -item[1])[:12]:
        table.add_row(Text(name), Text(column), f"{difference:.2g}")
    Console().print(table)
    if max(differences.values(), default=0.0) > given.tolerance:
        print(f"foretune: the repetition differs by more than {given.tolerance:g}.", file=sys.stderr)
        sys.exit(1)
