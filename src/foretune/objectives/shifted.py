"""A margin that has to be exceeded by some more (an offset)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foretune.objectives.base import FloatArray, Objective
from foretune.objectives.dpo import DPO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shifted(Objective):
    """ℓ(m − o): DPO with an offset (Amini et al., 2024, arXiv 2402.10571) where ℓ is DPO's.

    Attributes:
        base: ℓ.
        by: o, in the margin's own unit (nats).

    >>> import numpy as np
    >>> float(Shifted(base=DPO(beta=0.1), by=5.0).value(np.array(5.0))).__round__(6)
    0.693147
    """

    base: Objective = field(default_factory=DPO)
    by: float = 0.0

    @property
    def unit(self) -> float:
        """That of ℓ."""
        return self.base.unit

    def value(self, margin: FloatArray) -> FloatArray:
        """ℓ(m − o)."""
        return self.base.value(margin - self.by)

    def slope(self, margin: FloatArray) -> FloatArray:
        """ℓ′(m − o)."""
        return self.base.slope(margin - self.by)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """ℓ″(m − o)."""
        return self.base.curvature(margin - self.by)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """ℓ(m − o) on a tensor."""
        return self.base.torch_value(margin - self.by)
