"""Objectives that treat the chosen and the rejected score apart: no function of their difference alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foretune.objectives.base import FloatArray, Objective

if TYPE_CHECKING:
    from torch import Tensor


class SidedObjective(ABC):
    """A loss ℓ(c, r) of the scores of the chosen and the rejected response (in nats), of equal shape (…)."""

    @abstractmethod
    def value(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """ℓ(c, r), shape (…)."""

    @abstractmethod
    def slopes(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """∂ℓ/∂c and ∂ℓ/∂r, shape (2, …)."""

    @abstractmethod
    def curvature(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """The matrix of second derivatives, shape (2, 2, …)."""

    @abstractmethod
    def torch_value(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        """ℓ(c, r) on torch tensors, differentiable."""


class SidedLoss(NamedTuple):
    """A sided loss of n pairs whose margins and chosen scores are known: rejected = chosen − margin.

    Who follows the scores of a run follows 2n numbers: the n margins, then the n chosen scores.

    Attributes:
        objective: the loss of one pair.
        num_pairs: n.
        unpaired: its two terms are trained on apart, as rows of one response each (see `Unpaired`).
    """

    objective: SidedObjective
    num_pairs: int
    unpaired: bool = False

    def value(self, margin: FloatArray, chosen: FloatArray) -> FloatArray:
        """Of some pairs, shape (…)."""
        return self.objective.value(chosen, chosen - margin)

    def both(self, pairs):
        """The places of some pairs' margins and chosen scores, shape (2k,); NumPy."""
        return np.concatenate([pairs, np.asarray(pairs) + self.num_pairs])


class Term(NamedTuple):
    """weight · ℓ(chosen · c + rejected · r)."""

    loss: Objective
    chosen: float
    rejected: float
    weight: float = 1.0


@dataclass(frozen=True)
class SumOfTerms(SidedObjective):
    """Σ_k w_k ℓ_k(a_k c + b_k r): losses of one number each."""

    terms: tuple[Term, ...]

    def value(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """Σ w ℓ."""
        found = [w * loss.value(a * chosen + b * rejected) for loss, a, b, w in self.terms]
        return np.sum(found, axis=0)

    def slopes(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """Σ w ℓ′ (a, b)."""
        found = [w * np.multiply.outer([a, b], loss.slope(a * chosen + b * rejected)) for loss, a, b, w in self.terms]
        return np.sum(found, axis=0)

    def curvature(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """Σ w ℓ″ (a, b)(a, b)ᵀ."""
        found = [
            w * np.multiply.outer(np.outer([a, b], [a, b]), loss.curvature(a * chosen + b * rejected))
            for loss, a, b, w in self.terms
        ]
        return np.sum(found, axis=0)

    def torch_value(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        """Σ w ℓ on tensors."""
        first, *others = (w * loss.torch_value(a * chosen + b * rejected) for loss, a, b, w in self.terms)
        return sum(others, first)
