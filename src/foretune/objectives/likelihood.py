"""The negative log-likelihood, the supervised part of CPO and ORPO."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray, Objective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NegativeLogLikelihood(Objective):
    """ℓ(x) = −x, of one response's log-probability x.

    >>> float(NegativeLogLikelihood().value(np.array(-2.0)))
    2.0
    """

    @property
    def unit(self) -> float:
        """1: it changes everywhere alike."""
        return 1.0

    def value(self, margin: FloatArray) -> FloatArray:
        """−x."""
        return -np.asarray(margin, dtype=float)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−1, everywhere."""
        return np.full_like(np.asarray(margin, dtype=float), -1.0)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """0, everywhere."""
        return np.zeros_like(np.asarray(margin, dtype=float))

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """−x on a tensor."""
        return -margin
