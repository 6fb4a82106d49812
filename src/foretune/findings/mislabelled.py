"""Pairs that lie on the wrong side of a behaviour that is otherwise clear: mislabelled, or about something else."""

from collections.abc import Iterator

import numpy as np
from scipy.stats import binom, norm

from foretune.findings.finding import Evidence, Finding

# Below this separability the wrong side is full of correctly labelled pairs.
LEAST_SEPARABILITY = 1.0
FAR_SIDE = -1.0
# A count that honest labels reach in one data set of a thousand.
TAIL = 1e-3


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding a clear behaviour with more pairs beyond the other side's mean than a Gaussian spread explains."""
    for row in evidence.trained():
        if not row["separability"] >= LEAST_SEPARABILITY:
            continue
        own = evidence.column("alignment", row["behaviour"])
        own = own[np.isfinite(own)]
        far = int((own < FAR_SIDE).sum())
        expected = float(norm.cdf(-row["separability"]))
        if far and binom.sf(far - 1, len(own), expected) < TAIL:
            yield Finding(
                "mislabelled",
                "medium",
                row["behaviour"],
                far,
                f"{far} of {len(own)} pairs of {row['behaviour']} lie beyond the middle of the other side, where about "
                f"{expected * len(own):.1f} are expected.",
                "Read the pairs listed under “pairs worth a look”: flip or remove those that are mislabelled.",
            )
