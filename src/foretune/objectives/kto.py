"""Kahneman–Tversky Optimization (Ethayarajh et al., 2024, arXiv 2402.01306, equation 7)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.objectives.saturating import Saturating
from foretune.objectives.shifted import Shifted
from foretune.objectives.sided import SumOfTerms, Term


def unpaired_order(count: int, arguments: Any) -> NDArray[np.int64]:
    """The order in which responses are trained on as rows of their own, shape (count,).

    Of pairs, i's chosen response is 2i and its rejected one 2i + 1.

    Args:
        count: responses.
        arguments: of training; their data seed, or else their seed, decides.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return np.random.default_rng(seed).permutation(count)


def kto_pair(
    *,
    beta: float = 0.1,
    reference_point: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> SumOfTerms:
    """λ_D (1 − σ(β(c − z))) + λ_U (1 − σ(β(z − r))), c and r log-ratios against the reference.

    KTO's own data are unpaired rows: `Unpaired(kto_pair(...))`, whose mean over 2n rows is half of this over n pairs.

    Args:
        beta: β.
        reference_point: z ≥ 0, the batch's estimate of KL(π‖π_ref) (nats); no gradient goes through it.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    >>> float(kto_pair(beta=0.1, reference_point=0.0).value(0.0, 0.0))
    1.0
    """
    loss = Saturating(beta=beta)
    return SumOfTerms(
        (
            Term(Shifted(base=loss, by=reference_point), 1.0, 0.0, desirable_weight),
            Term(Shifted(base=loss, by=-reference_point), 0.0, -1.0, undesirable_weight),
        )
    )
