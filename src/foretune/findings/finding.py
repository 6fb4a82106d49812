"""What a finding is, and the list of all of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from foretune.statistics.priority import BehaviourKernel

SEVERITIES = ("high", "medium", "low", "info")


class Finding(NamedTuple):
    """One thing that the user should know before training.

    Attributes:
        finding: short name, stable for programs.
        severity: high, medium, low or info.
        behaviour: which behaviour, None for all.
        num_pairs: pairs concerned.
        evidence: a sentence with the figures.
        remedy: a sentence on what to do.
    """

    finding: str
    severity: str
    behaviour: str | None
    num_pairs: int
    evidence: str
    remedy: str


class Evidence(NamedTuple):
    """What findings are read from.

    Attributes:
        behaviours: rows of behaviours.parquet.
        pairs: rows of pairs.parquet.
        counts: the data's counts per behaviour and split.
        kernel: the behaviour kernel.
    """

    behaviours: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    counts: list[dict[str, Any]]
    kernel: BehaviourKernel

    def trained(self) -> list[dict[str, Any]]:
        """Rows of the training split."""
        return [row for row in self.behaviours if row["split"] == "train"]


def find_all(evidence: Evidence) -> list[Finding]:
    """Every finding, the most severe first."""
    from foretune.findings import (
        conflicting,
        dropped,
        indistinguishable,
        length_biased,
        mislabelled,
        one_class,
        too_few,
        unbalanced,
    )

    finders: list[Callable[[Evidence], Iterator[Finding]]] = [
        conflicting.find,
        indistinguishable.find,
        one_class.find,
        too_few.find,
        unbalanced.find,
        mislabelled.find,
        length_biased.find,
        dropped.find,
    ]
    found = [finding for find in finders for finding in find(evidence)]
    return sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.num_pairs))
