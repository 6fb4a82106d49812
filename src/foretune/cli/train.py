"""`foretune train`: train, observed."""

from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress
from foretune.verbs.train import train


def run(arguments: Sequence[str]) -> None:
    """Parse, train, report."""
    finish(train(parse_job(arguments, prog="foretune train"), progress=Progress()))
