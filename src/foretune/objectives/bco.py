"""Binary Classifier Optimization (Jung et al., 2024, arXiv 2404.04656)."""

from foretune.objectives.dpo import DPO
from foretune.objectives.shifted import Shifted
from foretune.objectives.sided import SumOfTerms, Term


def bco(*, beta: float = 0.1, reward_shift: float = 0.0) -> SumOfTerms:
    """−log σ(βc − δ) − log σ(δ − βr), c and r log-ratios against the reference.

    Args:
        beta: β.
        reward_shift: δ, the paper's running mean of rewards βc and βr; 0 is TRL's `bco_pair`.

    >>> float(bco(beta=0.1).value(0.0, 0.0)).__round__(6)
    1.386294
    """
    loss, point = DPO(beta=beta), reward_shift / beta
    return SumOfTerms((Term(Shifted(base=loss, by=point), 1.0, 0.0), Term(Shifted(base=loss, by=-point), 0.0, -1.0)))
