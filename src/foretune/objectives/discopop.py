"""DiscoPOP, a discovered loss (Lu et al., 2024, arXiv 2406.08414, equation 5)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(ScaledObjective):
    """ℓ(m) = (1 − s) log(1 + e^{−u}) + s e^{−u}, u = βm, s = σ(u/τ); not convex.

    s e^{−u} is computed as one power, so that it stays finite where e^{−u} does not.

    Attributes:
        tau: τ, in (0, 1]; above 1 the loss grows without bound as u falls.

    >>> float(DiscoPOP(beta=0.1).value(np.array(0.0))).__round__(6)
    0.846574
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        """Refuse a temperature at which the loss overflows."""
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"discopop_tau must lie in (0, 1], got {self.tau}.")

    def value(self, margin: FloatArray) -> FloatArray:
        """(1 − s) log(1 + e^{−u}) + s e^{−u}."""
        scaled = self.beta * margin
        return expit(-scaled / self.tau) * np.logaddexp(0.0, -scaled) + self._power(scaled)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−(1 − s) σ(−u) − s′ log(1 + e^{−u}) + s e^{−u} ((1 − s)/τ − 1), times β; s′ = s (1 − s)/τ."""
        scaled = self.beta * margin
        mixed, rest, logistic = expit(scaled / self.tau), expit(-scaled / self.tau), np.logaddexp(0.0, -scaled)
        found = -rest * expit(-scaled) - mixed * rest / self.tau * logistic
        return self.beta * (found + self._power(scaled) * (rest / self.tau - 1))

    def curvature(self, margin: FloatArray) -> FloatArray:
        """The derivative of the slope."""
        scaled = self.beta * margin
        mixed, rest, logistic = expit(scaled / self.tau), expit(-scaled / self.tau), np.logaddexp(0.0, -scaled)
        first = mixed * rest / self.tau
        second = first * (rest - mixed) / self.tau
        found = rest * expit(scaled) * expit(-scaled) + 2 * first * expit(-scaled) - second * logistic
        return self.beta**2 * (found + self._power(scaled) * ((rest / self.tau - 1) ** 2 - first / self.tau))

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """The same on a tensor."""
        from torch.nn.functional import logsigmoid

        scaled = self.beta * margin
        logistic = (-scaled / self.tau).sigmoid() * -logsigmoid(scaled)
        return logistic + (logsigmoid(scaled / self.tau) - scaled).exp()

    def _power(self, scaled: FloatArray) -> FloatArray:
        """The power s e^{−u}."""
        return np.exp(-np.logaddexp(0.0, -scaled / self.tau) - scaled)
