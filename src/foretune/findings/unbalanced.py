"""A Yes/No behaviour in which one answer is preferred more often: that answer is learned for everything."""

from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding

LARGEST_SHARE = 0.55


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a two-answer behaviour of which more than 55 % of the training pairs prefer the same answer."""
    for row in evidence.trained():
        answers = evidence.answers.preferred(row["behaviour"])
        if len(answers) != 2:
            continue
        answer, count = answers.most_common(1)[0]
        total = answers.total()
        if count > LARGEST_SHARE * total:
            yield Finding(
                "unbalanced",
                "medium" if count > 0.65 * total else "low",
                row["behaviour"],
                total,
                f"{count} of {total} pairs of {row['behaviour']} prefer “{answer.strip()}”: training also learns to "
                "give that answer whatever the question, in every behaviour.",
                "Balance the answers, or weight the rarer one up.",
            )
