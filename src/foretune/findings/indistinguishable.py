"""A behaviour whose preferred and rejected examples lie no further apart than shuffled labels would."""

from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour below its permutation floor."""
    for row in evidence.trained():
        if row["distinguishability"] <= row["permutation_floor"]:
            yield Finding(
                "indistinguishable",
                "medium",
                row["behaviour"],
                row["num_pairs"],
                f"{row['behaviour']} has distinguishability {row['distinguishability']:.2f} before the part of noise "
                f"is taken off, not above the {row['permutation_floor']:.2f} that shuffled labels reach with "
                f"{row['num_pairs']} pairs.",
                "Check the labels, add pairs, or expect this behaviour not to generalise.",
            )
