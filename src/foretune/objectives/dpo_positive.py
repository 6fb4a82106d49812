"""DPO-Positive (Pal et al., 2024, "Smaug", arXiv 2402.13228)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray, Objective
from foretune.objectives.dpo import DPO
from foretune.objectives.sided import SidedObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DPOPositive(SidedObjective):
    """ℓ(c − r − λ max(0, −c)), c and r log-ratios against the reference: a chosen response must not lose likelihood.

    Attributes:
        base: ℓ; the paper's is DPO's.
        penalty: λ.

    >>> float(DPOPositive(base=DPO(beta=0.1), penalty=5.0).value(-1.0, -6.0)).__round__(6)
    0.693147
    """

    base: Objective = field(default_factory=DPO)
    penalty: float = 5.0

    def value(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """ℓ(c − r − λ max(0, −c))."""
        return self.base.value(self._margin(chosen, rejected))

    def slopes(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """ℓ′ (1 + λ[c < 0], −1)."""
        return self._directions(chosen) * self.base.slope(self._margin(chosen, rejected))

    def curvature(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """ℓ″ of the outer product of (1 + λ[c < 0], −1), but where c = 0."""
        directions = self._directions(chosen)
        return directions[:, None] * directions[None] * self.base.curvature(self._margin(chosen, rejected))

    def torch_value(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        """The same on tensors."""
        return self.base.torch_value(chosen - rejected - self.penalty * (-chosen).relu())

    def _margin(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        return chosen - rejected - self.penalty * np.maximum(0.0, np.negative(chosen))

    def _directions(self, chosen: FloatArray) -> FloatArray:
        """Derivatives of the penalised margin, shape (2, …)."""
        steep = np.where(np.less(chosen, 0.0), 1.0 + self.penalty, 1.0)
        return np.stack([steep, -np.ones_like(steep)])
