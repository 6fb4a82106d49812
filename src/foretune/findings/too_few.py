"""A behaviour with too few pairs for any statement about it."""

from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding

FEWEST = 20


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour with fewer than 20 training pairs."""
    for row in evidence.trained():
        if row["num_pairs"] < FEWEST:
            yield Finding(
                "too_few",
                "low",
                row["behaviour"],
                row["num_pairs"],
                f"{row['behaviour']} was audited on {row['num_pairs']} training pair(s): intervals are wide or "
                "undefined.",
                "Add pairs (or audit more of them), or merge it with a related behaviour.",
            )
