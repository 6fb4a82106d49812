"""What every objective of one margin is: three functions of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float64]


class Objective(ABC):
    """A loss ℓ of the margin m: the score of the chosen response less that of the rejected one (in nats).

    What a score is (summed or averaged over tokens, against the reference or not) is `foretune.scores.Convention`'s.
    """

    @property
    @abstractmethod
    def unit(self) -> float:
        """The change of the margin over which the loss changes, 1/β (nats)."""

    @abstractmethod
    def value(self, margin: FloatArray) -> FloatArray:
        """ℓ(m), of the shape of `margin`."""

    @abstractmethod
    def slope(self, margin: FloatArray) -> FloatArray:
        """ℓ′(m) = dℓ/dm, of the shape of `margin`."""

    @abstractmethod
    def curvature(self, margin: FloatArray) -> FloatArray:
        """ℓ″(m), of the shape of `margin`."""

    @abstractmethod
    def torch_value(self, margin: "Tensor") -> "Tensor":
        """ℓ(m) on a torch tensor, differentiable; torch is imported only here, so that reading a record needs none."""


@dataclass(frozen=True, kw_only=True)
class ScaledObjective(Objective):
    """A loss of βm.

    Attributes:
        beta: how strongly the margin is scaled before the loss sees it (> 0).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a beta that no objective is defined for."""
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}.")

    @property
    def unit(self) -> float:
        """1/β."""
        return 1.0 / self.beta
