"""β-DPO: a beta for every batch (Wu et al., 2024, arXiv 2407.08639)."""

from dataclasses import dataclass

import numpy as np

from foretune.objectives.base import FloatArray
from foretune.objectives.dpo import DPO


@dataclass(frozen=True, kw_only=True)
class BetaDPO:
    """DPO whose β follows the batch: β = β₀ (1 + a (M̄ − M₀)), M̄ the mean of the batch's β₀m.

    No loss of one pair, because M̄ is the batch's; once it is known the loss is DPO's.

    Attributes:
        beta: β₀.
        strength: a.
        threshold: M₀, the mean of β₀m over what was trained on so far.
        least: β never falls below this share of β₀ (ours: the formula's β can turn negative).

    >>> BetaDPO(beta=0.1, strength=0.5, threshold=0.0).of_batch(np.array([10.0, 30.0]))
    DPO(beta=0.2)
    """

    beta: float = 0.1
    strength: float = 0.6
    threshold: float = 0.0
    least: float = 1e-3

    def of_batch(self, margin: FloatArray) -> DPO:
        """The objective of a batch with these margins, shape (pairs,)."""
        above = self.beta * float(np.mean(margin)) - self.threshold
        return DPO(beta=self.beta * max(1 + self.strength * above, self.least))
