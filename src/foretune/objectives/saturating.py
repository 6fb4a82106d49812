"""The loss that stops caring at both ends, of which KTO and APO are made."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Saturating(ScaledObjective):
    """ℓ(x) = 1 − σ(βx) = σ(−βx): the negated Kahneman–Tversky value of KTO; not convex.

    >>> float(Saturating(beta=0.1).slope(np.array(0.0))).__round__(6)
    -0.025
    """

    def value(self, margin: FloatArray) -> FloatArray:
        """σ(−βx)."""
        return expit(-self.beta * margin)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−β σ(βx) σ(−βx)."""
        return -self.beta * expit(self.beta * margin) * expit(-self.beta * margin)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """β² σ(βx) σ(−βx) tanh(βx/2)."""
        return -self.beta * self.slope(margin) * np.tanh(self.beta * margin / 2)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """σ(−βx) on a tensor."""
        return (-self.beta * margin).sigmoid()
