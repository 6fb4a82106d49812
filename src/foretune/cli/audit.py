"""`foretune audit`: measure the data with the model."""

from collections.abc import Sequence

from foretune.cli.finish import finish
from foretune.verbs.audit import audit
from foretune.verbs.job import parse_job
from foretune.verbs.progress import Progress


def run(arguments: Sequence[str]) -> None:
    """Parse, audit, report."""
    finish(audit(parse_job(arguments, prog="foretune audit"), progress=Progress()))
