"""Losses for data of which a share ε of the labels is taken to be flipped."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foretune.objectives.base import FloatArray, Objective
from foretune.objectives.dpo import DPO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoisyLabels(Objective):
    """The two shares of ℓ: k ℓ(m) + f ℓ(−m), where the two shares follow from ε.

    Attributes:
        base: ℓ.
        rate: ε, the share of flipped labels, in [0, 1/2).
    """

    base: Objective = field(default_factory=DPO)
    rate: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a share that leaves nothing to learn."""
        if not 0 <= self.rate < 0.5:
            raise ValueError(f"label smoothing must lie in [0, 0.5), got {self.rate}.")

    @property
    def unit(self) -> float:
        """That of ℓ."""
        return self.base.unit

    @property
    @abstractmethod
    def shares(self) -> tuple[float, float]:
        """What ℓ(m) and ℓ(−m) are multiplied by."""

    def value(self, margin: FloatArray) -> FloatArray:
        """The two shares of ℓ: k ℓ(m) + f ℓ(−m)."""
        kept, flipped = self.shares
        return kept * self.base.value(margin) + flipped * self.base.value(-margin)

    def slope(self, margin: FloatArray) -> FloatArray:
        """The two shares of ℓ: k ℓ′(m) − f ℓ′(−m)."""
        kept, flipped = self.shares
        return kept * self.base.slope(margin) - flipped * self.base.slope(-margin)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """The two shares of ℓ: k ℓ″(m) + f ℓ″(−m)."""
        kept, flipped = self.shares
        return kept * self.base.curvature(margin) + flipped * self.base.curvature(-margin)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """The two shares of ℓ: k ℓ(m) + f ℓ(−m) on a tensor."""
        kept, flipped = self.shares
        return kept * self.base.torch_value(margin) + flipped * self.base.torch_value(-margin)


@dataclass(frozen=True, kw_only=True)
class LabelSmoothed(NoisyLabels):
    """(1 − ε) ℓ(m) + ε ℓ(−m): conservative DPO (Mitchell, 2023, "A note on DPO with noisy preferences") of any ℓ.

    >>> import numpy as np
    >>> float(LabelSmoothed(base=DPO(beta=0.1), rate=0.1).slope(np.array(0.0))).__round__(6)
    -0.04
    """

    @property
    def shares(self) -> tuple[float, float]:
        """1 − ε and ε."""
        return 1 - self.rate, self.rate


@dataclass(frozen=True, kw_only=True)
class Robust(NoisyLabels):
    """((1 − ε) ℓ(m) − ε ℓ(−m)) / (1 − 2ε): rDPO (Ray Chowdhury et al., 2024, arXiv 2403.00409) of any ℓ.

    Its mean over labels that are flipped with probability ε is ℓ(m) on the true ones.

    >>> import numpy as np
    >>> float(Robust(base=DPO(beta=0.1), rate=0.1).slope(np.array(0.0))).__round__(6)
    -0.0625
    """

    @property
    def shares(self) -> tuple[float, float]:
        """(1 − ε)/(1 − 2ε) and −ε/(1 − 2ε)."""
        return (1 - self.rate) / (1 - 2 * self.rate), -self.rate / (1 - 2 * self.rate)
