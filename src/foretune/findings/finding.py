"""What a finding is, and the list of all of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

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


class AnswerCounts:
    """How often each couple of answers occurs in a behaviour, as long as it has two couples at most."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self._couples: dict[str, Counter[tuple[str, str]] | None] = {}

    def add(self, behaviour: str, chosen: str, rejected: str) -> None:
        """Count one pair; free text is given up at the third couple."""
        couples = self._couples.setdefault(behaviour, Counter())
        if couples is not None:
            couples[chosen, rejected] += 1
            if len(couples) > 2:
                self._couples[behaviour] = None

    def preferred(self, behaviour: str) -> Counter[str]:
        """How often each of two answers is the chosen one; empty where a behaviour has not the same two throughout."""
        couples = self._couples.get(behaviour) or Counter()
        if len({frozenset(couple) for couple in couples}) != 1:
            return Counter()
        return Counter({chosen: count for (chosen, _), count in couples.items()})


class Evidence(NamedTuple):
    """What findings are read from.

    Attributes:
        behaviours: rows of behaviours.parquet.
        pairs: columns of the training pairs: behaviour, chosen_tokens, rejected_tokens and alignment, shape (n,) each.
        answers: the training pairs' answers.
        counts: the data's counts per behaviour and split.
        kernel: the behaviour kernel.
    """

    behaviours: list[dict[str, Any]]
    pairs: dict[str, np.ndarray]
    answers: AnswerCounts
    counts: list[dict[str, Any]]
    kernel: BehaviourKernel

    def trained(self) -> list[dict[str, Any]]:
        """Rows of the training split."""
        return [row for row in self.behaviours if row["split"] == "train"]

    def column(self, name: str, behaviour: str) -> np.ndarray:
        """A column of one behaviour's training pairs."""
        return self.pairs[name][self.pairs["behaviour"] == behaviour]


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
