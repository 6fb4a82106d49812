"""Efficient Exact Optimization (Ji et al., 2024, arXiv 2402.00856, equation 16)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EXO(ScaledObjective):
    """ℓ(m) = KL(q ‖ p): q = (σ(βm), σ(−βm)), p = (1 − ε, ε) the labels smoothed by ε; not convex.

    Attributes:
        rate: ε, in (0, 1/2): at 0 the divergence is infinite.

    >>> float(EXO(beta=0.1, rate=0.25).slope(np.array(0.0))).__round__(6)
    -0.027465
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse a share of flipped labels at which nothing is defined."""
        super().__post_init__()
        if not 0 < self.rate < 0.5:
            raise ValueError(f"EXO needs label smoothing in (0, 0.5), e.g. 0.001, got {self.rate}.")

    def value(self, margin: FloatArray) -> FloatArray:
        """q₁ log(q₁/(1 − ε)) + q₂ log(q₂/ε)."""
        scaled = self.beta * margin
        chosen = expit(scaled) * (-np.logaddexp(0.0, -scaled) - np.log1p(-self.rate))
        return chosen + expit(-scaled) * (-np.logaddexp(0.0, scaled) - np.log(self.rate))

    def slope(self, margin: FloatArray) -> FloatArray:
        """β q₁ q₂ (βm − log((1 − ε)/ε))."""
        scaled = self.beta * margin
        return self.beta * expit(scaled) * expit(-scaled) * (scaled - self._target)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """β² q₁ q₂ (1 − tanh(βm/2) (βm − log((1 − ε)/ε)))."""
        scaled = self.beta * margin
        bend = 1 - np.tanh(scaled / 2) * (scaled - self._target)
        return self.beta**2 * expit(scaled) * expit(-scaled) * bend

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """The same on a tensor."""
        from torch.nn.functional import logsigmoid

        scaled = self.beta * margin
        chosen = scaled.sigmoid() * (logsigmoid(scaled) - float(np.log1p(-self.rate)))
        return chosen + (-scaled).sigmoid() * (logsigmoid(-scaled) - float(np.log(self.rate)))

    @property
    def _target(self) -> float:
        """The βm of the minimum."""
        return float(np.log1p(-self.rate) - np.log(self.rate))
