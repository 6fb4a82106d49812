"""Anchored Preference Optimization (D'Oosterlinck et al., 2024, arXiv 2408.06266, equations 7 and 8)."""

from foretune.objectives.saturating import Saturating
from foretune.objectives.sided import SumOfTerms, Term


def apo_zero(*, beta: float = 0.1) -> SumOfTerms:
    """1 − σ(βc) + σ(βr): raises the chosen response and lowers the rejected one.

    >>> float(apo_zero(beta=0.1).value(0.0, 0.0))
    1.0
    """
    loss = Saturating(beta=beta)
    return SumOfTerms((Term(loss, 1.0, 0.0), Term(loss, 0.0, -1.0)))


def apo_down(*, beta: float = 0.1) -> SumOfTerms:
    """σ(βc) + 1 − σ(β(c − r)): lowers both responses, the rejected one more.

    >>> float(apo_down(beta=0.1).value(0.0, 0.0))
    1.0
    """
    loss = Saturating(beta=beta)
    return SumOfTerms((Term(loss, -1.0, 0.0), Term(loss, 1.0, -1.0)))
