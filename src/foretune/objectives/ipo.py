"""Identity Preference Optimization (Azar et al., 2024, arXiv 2310.12036, equation 17)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IPO(ScaledObjective):
    """ℓ(m) = (m − 1/(2β))²; `beta` is the paper's τ; sum or per-token mean is the score's choice.

    >>> float(IPO(beta=0.5).value(np.array(0.0)))
    1.0
    """

    def value(self, margin: FloatArray) -> FloatArray:
        """(m − 1/(2β))²."""
        return (margin - 0.5 / self.beta) ** 2

    def slope(self, margin: FloatArray) -> FloatArray:
        """2(m − 1/(2β))."""
        return 2.0 * (margin - 0.5 / self.beta)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """2, everywhere."""
        return np.full_like(np.asarray(margin, dtype=float), 2.0)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """(m − 1/(2β))² on a tensor."""
        return (margin - 0.5 / self.beta) ** 2
