"""Chosen answers that are much longer or shorter than rejected ones: length is learned before content."""

from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding

LARGEST_RATIO = 1.5


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour whose mean lengths differ by more than a factor of 1.5."""
    for row in evidence.trained():
        lengths = [evidence.column(f"{side}_tokens", row["behaviour"]) for side in ("chosen", "rejected")]
        if not all((own > 0).any() for own in lengths):
            continue
        chosen, rejected = (float(own[own > 0].mean()) for own in lengths)  # an unpaired row has one of the two
        if max(chosen, rejected) > LARGEST_RATIO * min(chosen, rejected):
            longer = "chosen" if chosen > rejected else "rejected"
            yield Finding(
                "length_biased",
                "medium",
                row["behaviour"],
                row["num_pairs"],
                f"In {row['behaviour']} the {longer} answers are longer: {chosen:.0f} tokens chosen, {rejected:.0f} "
                "rejected on average.",
                "If length is not what you mean to teach, balance it, or use a length-normalised loss.",
            )
