"""What the score of a response is: the choice that losses differ in besides their formula."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.models.encoding import EncodedPair


class Convention(NamedTuple):
    """How the margin of a pair is made from token log-probabilities.

    Attributes:
        per_token: scores are means over a response's tokens (IPO as TRL has it, SimPO, ORPO), else sums (DPO).
        reference: scores are log-ratios against the reference (DPO, IPO), else log-probabilities (SimPO, CPO, ORPO).
    """

    per_token: bool = False
    reference: bool = True

    def scored(self, pairs: Sequence[EncodedPair]) -> Sequence[EncodedPair]:
        """The same pairs, whose features and scores are then taken by this convention."""
        return PerToken(pairs) if self.per_token else pairs

    def margins(self, log_probs: NDArray[np.float64], lengths: NDArray[np.integer]) -> NDArray[np.float64]:
        """Chosen less rejected score, shape (…, n).

        Args:
            log_probs: summed over the tokens of chosen and rejected responses, shape (…, 2, n).
            lengths: tokens of the chosen and the rejected response, shape (n, 2).
        """
        scores = log_probs / lengths.T if self.per_token else log_probs
        return scores[..., 0, :] - scores[..., 1, :]

    def __str__(self) -> str:
        """In words."""
        return f"{'per-token means' if self.per_token else 'sums'}{'' if self.reference else ', no reference'}"


class PerToken(Sequence[EncodedPair]):
    """Pairs whose scores are means over tokens, read when they are asked for."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        """Wrap pairs in any order."""
        self._pairs = pairs

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def __getitem__(self, index):
        """One pair, or a list of some."""
        if isinstance(index, slice):
            return [pair._replace(per_token=True) for pair in self._pairs[index]]
        return self._pairs[index]._replace(per_token=True)
