"""`foretune compare`: several methods on the same data."""

import argparse
from collections.abc import Sequence

from foretune import processes
from foretune.errors import UserError
from foretune.report import build_comparison, print_comparison
from foretune.verbs.compare import METHODS, check_methods, compare
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress


def run(arguments: Sequence[str]) -> None:
    """Parse, run what is missing, write the page; all other arguments are those of `train` and `forecast`."""
    parser = argparse.ArgumentParser("foretune compare", add_help=False, allow_abbrev=False)
    parser.add_argument("--methods", default="dpo,ipo,slic", help=f"with commas between them: {', '.join(METHODS)}")
    parser.add_argument("--seeds", help="with commas between them; default: --seed alone")
    own, rest = parser.parse_known_args(arguments)
    methods = [name.strip() for name in own.methods.split(",") if name.strip()]
    check_methods(methods)  # refuse before any work
    job = parse_job(rest, prog="foretune compare", verb=parser)
    folder = compare(job, methods=methods, seeds=_numbers(own.seeds), progress=Progress())
    if processes.is_main():
        page = build_comparison(folder.path)
        print_comparison(folder.path)
        print(f"report: {page}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text}: whole numbers with commas between them are needed, e.g. 0,1,2.") from error
