"""`foretune verify`: forecast beside outcome."""

import argparse
from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.cli.run_folder import add_run_folder
from foretune.verbs.bounds import check_bounds
from foretune.verbs.progress import Progress
from foretune.verbs.verify import verify


def run(arguments: Sequence[str]) -> None:
    """Parse, verify, report."""
    parser = argparse.ArgumentParser("foretune verify", description="Lay forecast and run side by side.")
    add_run_folder(parser)
    parser.add_argument("--split", default="train", choices=["train", "test"], help="whose curves to compare")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    given = parser.parse_args(arguments)
    check_bounds({"draws": given.draws, "seed": given.seed})
    finish(verify(given.output_dir, split=given.split, draws=given.draws, seed=given.seed, progress=Progress()))
