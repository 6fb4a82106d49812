"""`foretune reproduce`: the paper's claims on a named model and data set."""

import argparse
from collections.abc import Sequence

from foretune.claims.reproduce import DEFAULTS, DIALOGUE, chosen_claims, reproduce
from foretune.report import build_reproduction, print_reproduction
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress


def run(arguments: Sequence[str]) -> None:
    """Parse, test the claims, write their pages; all other arguments are those of the other verbs."""
    parser = argparse.ArgumentParser("foretune reproduce", add_help=False, allow_abbrev=False)
    parser.add_argument("--claims", help="only these, with commas between them: R1,R2")
    parser.add_argument("--quick", action="store_true", help="fewer behaviours, rows and runs")
    parser.add_argument("--dialogue_dataset_name", default=DIALOGUE, help="pairs with answers of several tokens")
    own, rest = parser.parse_known_args(arguments)
    claims = own.claims.split(",") if own.claims else None
    chosen_claims(claims)  # refuse before any work
    job = parse_job(rest, prog="foretune reproduce", defaults=DEFAULTS, verb=parser)
    folder = reproduce(
        job,
        claims=claims,
        quick=own.quick,
        dialogue_dataset_name=own.dialogue_dataset_name or None,
        progress=Progress(),
    )
    page = build_reproduction(folder.path)
    print_reproduction(folder.path)
    print(f"report: {page}")
