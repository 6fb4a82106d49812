"""Chosen answers that are much longer or shorter than rejected ones: length is learned before content."""

from collections.abc import Iterator

import numpy as np

from foretune.findings.finding import Evidence, Finding

LARGEST_RATIO = 1.5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour whose mean lengths differ by more than a factor of 1.5."""
    for row in evidence.trained():
        own = [pair for pair in evidence.pairs if pair["split"] == "train" and pair["behaviour"] == row["behaviour"]]
        chosen = float(np.mean([pair["chosen_tokens"] for pair in own]))
        rejected = float(np.mean([pair["rejected_tokens"] for pair in own]))
        if max(chosen, rejected) > LARGEST_RATIO * min(chosen, rejected):
            longer = "chosen" if chosen > rejected else "rejected"
            yield Finding(
                "length_biased",
                "medium",
                row["behaviour"],
                len(own),
                f"In {row['behaviour']} the {longer} answers are longer: {chosen:.0f} tokens chosen, {rejected:.0f} "
                "rejected on average.",
                "If length is not what you mean to teach, balance it, or use a length-normalised loss.",
            )
