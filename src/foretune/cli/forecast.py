"""`foretune forecast`: forecast the configured run."""

from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.verbs.forecast import forecast
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress


def run(arguments: Sequence[str]) -> None:
    """Parse, forecast, report."""
    finish(forecast(parse_job(arguments, prog="foretune forecast"), progress=Progress()))
