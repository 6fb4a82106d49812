"""A behaviour that the mixture as a whole pushes the other way: un-learned at first (theory T8)."""

from collections.abc import Iterator

import numpy as np

from foretune.findings.finding import Evidence, Finding


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a behaviour with (Gπ)_k < 0, naming the behaviour that pushes hardest against it."""
    kernel = evidence.kernel
    pushes = kernel.matrix * kernel.weights
    sizes = {row["behaviour"]: row["num_pairs"] for row in evidence.trained()}
    for index, behaviour in enumerate(kernel.behaviours):
        if pushes[index].sum() >= 0:
            continue
        opponent = int(np.argmin(pushes[index]))
        against = -pushes[index, pushes[index] < 0].sum()
        own = pushes[index, index]
        strength = f"{against / own:.1f} times its own pull" if own > 0 else "while it has no pull of its own"
        yield Finding(
            "conflicting",
            "high",
            behaviour,
            sizes.get(behaviour, 0),
            f"The mixture pushes {behaviour} the other way at first: the other behaviours push against it with "
            f"{strength}, most of all {kernel.behaviours[opponent]}.",
            f"Give {behaviour} more weight, {kernel.behaviours[opponent]} less, or train them apart.",
        )
