"""A Yes/No behaviour in which every pair prefers the same answer."""

from collections.abc import Iterator

import numpy as np

from foretune.findings.finding import Evidence, Finding


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour with pairs enough whose distinguishability is undefined."""
    for row in evidence.trained():
        if row["num_pairs"] >= 4 and np.isnan(row["distinguishability"]):
            yield Finding(
                "one_class",
                "high",
                row["behaviour"],
                row["num_pairs"],
                f"All (or all but one) of the {row['num_pairs']} pairs of {row['behaviour']} prefer the same answer: "
                "the model can learn to give that answer to everything.",
                "Add pairs that prefer the other answer, about as many.",
            )
