"""Objectives of a ranking: K responses to one prompt instead of two, ties allowed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.objectives.base import FloatArray
from foretune.objectives.dpo import DPO

if TYPE_CHECKING:
    from torch import Tensor

Ranks = NDArray[np.int64]


class RankingObjective(ABC):
    """A loss ℓ(s₁ … s_K) of the scores of K ranked responses (in nats), which a common shift of them leaves alone.

    Scores have the shape (…, K). Ranks have it too: the lower the better, equal where responses are tied, 0 where a
    row has fewer than K responses (what is said of scores there is not read). Two responses that are not tied have the
    loss of a pair.
    """

    @abstractmethod
    def value(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """ℓ(s), shape (…)."""

    @abstractmethod
    def slopes(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """∂ℓ/∂s_i, shape (…, K)."""

    @abstractmethod
    def curvature(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """∂²ℓ/∂s_i∂s_j, shape (…, K, K)."""

    @abstractmethod
    def torch_value(self, scores: "Tensor", ranks: "Tensor") -> "Tensor":
        """ℓ(s) on torch tensors, differentiable."""


def is_worse(ranks):
    """Whether response j is ranked strictly below response i, shape (…, i, j); NumPy or torch.

    >>> is_worse(np.array([1, 2, 2])).astype(int)
    array([[0, 1, 1],
           [0, 0, 0],
           [0, 0, 0]])
    """
    return (ranks[..., None, :] > ranks[..., :, None]) & (ranks[..., :, None] > 0)


class _Stages(NamedTuple):
    """One stage a response i, which competes with the worse ones alone: margins and who the competitors are."""

    margin: FloatArray
    """s_i less the soft maximum of the worse scores, shape (…, K)."""
    direction: FloatArray
    """Its gradient e_i − p_i, shape (…, K, K)."""


@dataclass(frozen=True, kw_only=True)
class StagedObjective(RankingObjective):
    """Σ_i c_i ℓ(s_i − (1/β) log Σ_{j worse than i} e^{βs_j}) with DPO's ℓ: responses are chosen stage by stage.

    Attributes:
        beta: how strongly scores are scaled (> 0).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a beta that no objective is defined for."""
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}.")

    @abstractmethod
    def stages(self, ranks) -> Any:
        """Which responses have a stage, among those with worse ones; they share c = 1 where `averaged`; (…, K)."""

    @property
    def averaged(self) -> bool:
        """Whether the stages' mean is taken (c_i = 1/number) or their sum (c_i = 1)."""
        return False

    def value(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """ℓ(s), without overflow at any score."""
        return (self._counts(ranks) * self._pair.value(self._stages(scores, ranks).margin)).sum(-1)

    def slopes(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """Σ_i c_i ℓ′ (e_i − p_i), p_i the softmax over the responses worse than i."""
        margin, direction = self._stages(scores, ranks)
        return np.einsum("...i,...ij->...j", self._counts(ranks) * self._pair.slope(margin), direction)

    def curvature(self, scores: FloatArray, ranks: Ranks) -> FloatArray:
        """Σ_i c_i [ℓ″ (e_i − p_i)(e_i − p_i)ᵀ − ℓ′ β (diag p_i − p_i p_iᵀ)]."""
        margin, direction = self._stages(scores, ranks)
        counts = self._counts(ranks)
        bent = np.einsum("...i,...ij,...ik->...jk", counts * self._pair.curvature(margin), direction, direction)
        worse = np.where(is_worse(ranks), -direction, 0.0)  # p_i
        steep = self.beta * counts * self._pair.slope(margin)
        spread = np.einsum("...i,...ij->...j", steep, worse)[..., None] * np.eye(ranks.shape[-1])
        return bent - spread + np.einsum("...i,...ij,...ik->...jk", steep, worse, worse)

    def torch_value(self, scores: "Tensor", ranks: "Tensor") -> "Tensor":
        """ℓ(s) on tensors."""
        from torch.nn.functional import logsigmoid

        worse = is_worse(ranks)
        some = worse.any(-1)
        scaled = self.beta * scores
        # a response without worse ones competes with all, and does not count: no gradient is then undefined
        rivals = scaled[..., None, :].expand(worse.shape).masked_fill(~(worse | ~some[..., None]), -np.inf)
        counts = (self.stages(ranks) & some).to(scaled)
        return (self._shared(counts) * -logsigmoid(scaled - rivals.logsumexp(-1))).sum(-1)

    @property
    def _pair(self) -> DPO:
        return DPO(beta=self.beta)

    def _counts(self, ranks: Ranks) -> FloatArray:
        return self._shared((self.stages(ranks) & is_worse(ranks).any(-1)).astype(float))

    def _shared(self, counts):
        return counts / counts.sum(-1)[..., None].clip(1) if self.averaged else counts

    def _stages(self, scores: FloatArray, ranks: Ranks) -> _Stages:
        worse = is_worse(ranks)
        rivals = np.where(worse | ~worse.any(-1, keepdims=True), scores[..., None, :], -np.inf)
        highest = rivals.max(-1, keepdims=True)
        odds = np.exp(self.beta * (rivals - highest))
        soft = highest[..., 0] + np.log(odds.sum(-1)) / self.beta
        return _Stages(scores - soft, np.eye(ranks.shape[-1]) - odds / odds.sum(-1, keepdims=True))
