"""A ranking as its pairs: any objective of one margin, averaged over them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray, Objective
from foretune.objectives.dpo import DPO
from foretune.objectives.ranking import RankingObjective, Ranks, is_worse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pairwise(RankingObjective):
    """ℓ(s) = mean of ℓ(s_i − s_j) over all responses i, j of which i is the better; ties are left out.

    Attributes:
        base: the loss of a pair.

    >>> ranks = np.array([1, 2, 2])
    >>> Pairwise(base=DPO(beta=1.0)).slopes(np.zeros(3), ranks).tolist()
    [-0.5, 0.25, 0.25]
    """

    base: Objective = field(default_factory=DPO)

    def value(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """The mean."""
        return self._mean(self.base.value(_differences(scores)), ranks).sum((-2, -1))

    def slopes(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """What a response gains as the better one of its pairs, less what it loses as the worse one."""
        pairs = self._mean(self.base.slope(_differences(scores)), ranks)
        return pairs.sum(-1) - pairs.sum(-2)

    def curvature(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """A weighted graph Laplacian: the weights are the pairs' curvatures."""
        pairs = self._mean(self.base.curvature(_differences(scores)), ranks)
        both = pairs + np.swapaxes(pairs, -1, -2)
        return both.sum(-1)[..., None] * np.eye(ranks.shape[-1]) - both

    def torch_value(self, scores: "Tensor", ranks: "Tensor") -> "Tensor":
        """The mean on tensors."""
        worse = is_worse(ranks).to(scores)
        counted = worse * self.base.torch_value(_differences(scores))
        return counted.sum((-2, -1)) / worse.sum((-2, -1)).clip(1)

    def _mean(self, of_pairs: FloatArray, ranks: Ranks) -> FloatArray:
        """Each pair's part of the mean, shape (…, K, K); 0 where all are tied."""
        worse = is_worse(ranks)
        return worse * of_pairs / worse.sum((-2, -1))[..., None, None].clip(1)


def _differences(scores):
    return scores[..., :, None] - scores[..., None, :]
