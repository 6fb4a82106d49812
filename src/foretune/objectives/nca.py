"""Noise Contrastive Alignment (Chen et al., 2024, arXiv 2402.05369) of two responses."""

from foretune.objectives.dpo import DPO
from foretune.objectives.sided import SumOfTerms, Term


def nca(*, beta: float = 0.1) -> SumOfTerms:
    """−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr), c and r log-ratios against the reference; TRL's `nca_pair`.

    >>> float(nca(beta=0.1).value(0.0, 0.0)).__round__(6)
    1.386294
    """
    loss = DPO(beta=beta)
    return SumOfTerms((Term(loss, 1.0, 0.0), Term(loss, -1.0, 0.0, 0.5), Term(loss, 0.0, -1.0, 0.5)))
