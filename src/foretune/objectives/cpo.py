"""Contrastive Preference Optimization (Xu et al., 2024, arXiv 2401.08417)."""

from foretune.objectives.base import Objective
from foretune.objectives.dpo import DPO
from foretune.objectives.likelihood import NegativeLogLikelihood
from foretune.objectives.sided import SumOfTerms, Term


def cpo(*, base: Objective | None = None, alpha: float = 1.0) -> SumOfTerms:
    """ℓ(c − r) − α c, c and r log-probabilities without a reference.

    TRL's likelihood term is a mean over all chosen tokens of a batch: it is this one where c is a mean over tokens and
    the batch's chosen responses are equally long.

    Args:
        base: ℓ; None: `DPO()`, as in the paper.
        alpha: weight of the likelihood term; at 0 the loss is ℓ of the margin.

    >>> float(cpo(base=DPO(beta=0.1)).value(-2.0, -2.0)).__round__(6)
    2.693147
    """
    return SumOfTerms((Term(base or DPO(), 1.0, -1.0), Term(NegativeLogLikelihood(), 1.0, 0.0, alpha)))
