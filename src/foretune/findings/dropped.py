"""Rows that training will not see, or not whole."""

from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding

REASONS = {
    "empty": "empty texts",
    "identical": "chosen equal to rejected",
    "malformed": "malformed rows",
    "leaked": "test prompts that are also in train",
    "too_long": "prompts that fill the whole context",
    "truncated": "answers cut at the maximum length",
    "duplicates": "exact repetitions (kept)",
}


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a reason, over all behaviours."""
    for reason, words in REASONS.items():
        concerned = {row["behaviour"]: row.get(reason, 0) for row in evidence.counts if row.get(reason, 0)}
        total = sum(concerned.values())
        if not total:
            continue
        read = sum(row["read"] for row in evidence.counts)
        names = ", ".join(sorted(concerned, key=lambda name: -concerned[name])[:5])
        yield Finding(
            f"data_{reason}",
            "medium" if total > 0.05 * read else "info",
            next(iter(concerned)) if len(concerned) == 1 else None,
            total,
            f"{total} of {read} rows: {words} ({names}{' and others' if len(concerned) > 5 else ''}).",
            "Raise --max_length if your hardware allows." if reason in ("too_long", "truncated") else "Clean the data.",
        )
