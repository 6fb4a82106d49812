"""Self-Play Preference Optimization with hard labels (Wu et al., 2024, arXiv 2405.00675, equation 4.7)."""

from foretune.objectives.ipo import IPO
from foretune.objectives.sided import SumOfTerms, Term


def sppo_hard(*, beta: float = 0.1) -> SumOfTerms:
    """(c − 1/(2β))² + (r + 1/(2β))², c and r log-ratios against the reference; the chosen response always wins.

    >>> float(sppo_hard(beta=0.5).value(0.0, 0.0))
    2.0
    """
    loss = IPO(beta=beta)
    return SumOfTerms((Term(loss, 1.0, 0.0), Term(loss, 0.0, -1.0)))
