"""Direct Preference Optimization (Rafailov et al., 2023, arXiv 2305.18290, equation 7)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DPO(ScaledObjective):
    """ℓ(m) = −log σ(βm).

    >>> float(DPO(beta=0.1).value(np.array(0.0))).__round__(6)
    0.693147
    >>> float(DPO(beta=0.5).slope(np.array(0.0)))
    -0.25
    """

    def value(self, margin: FloatArray) -> FloatArray:
        """−log σ(βm), without overflow at any margin."""
        return np.logaddexp(0.0, -self.beta * margin)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−β σ(−βm)."""
        return -self.beta * expit(-self.beta * margin)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """β² σ(βm) σ(−βm)."""
        return self.beta**2 * expit(self.beta * margin) * expit(-self.beta * margin)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """−log σ(βm) on a tensor."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self.beta * margin)
