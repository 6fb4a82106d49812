"""A Yes/No behaviour in which one answer is preferred more often: that answer is learned for everything."""

from collections import Counter
from collections.abc import Iterator

from foretune.findings.finding import Evidence, Finding

LARGEST_SHARE = 0.55


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a two-answer behaviour of which more than 55 % of the training pairs prefer the same answer."""
    for row in evidence.trained():
        own = [pair for pair in evidence.pairs if pair["split"] == "train" and pair["behaviour"] == row["behaviour"]]
        offered = {frozenset((pair["chosen"], pair["rejected"])) for pair in own}
        answers = Counter(pair["chosen"] for pair in own)
        if len(offered) != 1 or len(answers) != 2:
            continue
        answer, count = answers.most_common(1)[0]
        if count > LARGEST_SHARE * len(own):
            yield Finding(
                "unbalanced",
                "medium" if count > 0.65 * len(own) else "low",
                row["behaviour"],
                len(own),
                f"{count} of {len(own)} pairs of {row['behaviour']} prefer “{answer.strip()}”: training also learns to "
                "give that answer whatever the question, in every behaviour.",
                "Balance the answers, or weight the rarer one up.",
            )
