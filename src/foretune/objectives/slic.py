"""Sequence Likelihood Calibration's hinge (Zhao et al., 2023, arXiv 2305.10425, equation 2)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray, ScaledObjective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SLiC(ScaledObjective):
    """ℓ(m) = max(0, 1 − βm).

    >>> float(SLiC(beta=0.1).value(np.array(5.0)))
    0.5
    """

    def value(self, margin: FloatArray) -> FloatArray:
        """max(0, 1 − βm)."""
        return np.maximum(0.0, 1.0 - self.beta * margin)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−β below the kink, 0 above it and at it (as in torch's relu)."""
        return np.where(self.beta * margin < 1.0, -self.beta, 0.0)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """0 almost everywhere."""
        return np.zeros_like(np.asarray(margin, dtype=float))

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """max(0, 1 − βm) on a tensor."""
        from torch import relu

        return relu(1.0 - self.beta * margin)
