"""The Bradley–Terry likelihood of a reward model (Ouyang et al., 2022, arXiv 2203.02155, equation 1).

The margin that a pair must exceed is Llama 2's (Touvron et al., 2023, arXiv 2307.09288, equation 2).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from foretune.objectives.base import FloatArray, Objective

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(Objective):
    """ℓ(m) = −log σ(m − c), where m is the reward of chosen less that of rejected.

    >>> float(BradleyTerry().value(np.array(0.0))).__round__(6)
    0.693147
    >>> float(BradleyTerry(target=1.5).slope(np.array(1.5)))
    -0.5

    Attributes:
        target: c, one number or one for each margin, shape (n,) for margins of shape (…, n).
    """

    target: FloatArray | float = 0.0

    @property
    def unit(self) -> float:
        """1: rewards are not scaled."""
        return 1.0

    def value(self, margin: FloatArray) -> FloatArray:
        """−log σ(m − c), without overflow at any margin."""
        return np.logaddexp(0.0, self.target - margin)

    def slope(self, margin: FloatArray) -> FloatArray:
        """−σ(c − m)."""
        return -expit(self.target - margin)

    def curvature(self, margin: FloatArray) -> FloatArray:
        """σ(m − c) σ(c − m)."""
        return expit(margin - self.target) * expit(self.target - margin)

    def torch_value(self, margin: "Tensor") -> "Tensor":
        """−log σ(m − c) on a tensor."""
        import torch
        from torch.nn.functional import logsigmoid

        return -logsigmoid(margin - torch.as_tensor(self.target).to(margin))
