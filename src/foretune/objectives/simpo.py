"""Simple Preference Optimization (Meng et al., 2024, arXiv 2405.14734, equation 6)."""

from foretune.objectives.base import Objective
from foretune.objectives.dpo import DPO
from foretune.objectives.shifted import Shifted


def simpo(*, beta: float = 2.0, gamma: float = 0.5) -> Objective:
    """−log σ(βm − γ), m the difference of log-probabilities per token, without a reference.

    >>> import numpy as np
    >>> float(simpo(beta=2.0, gamma=1.0).value(np.array(0.5))).__round__(6)
    0.693147
    """
    return Shifted(base=DPO(beta=beta), by=gamma / beta)
