"""Weighted Preference Optimization's row weights (Zhou et al., 2024, arXiv 2406.11827, equation 2)."""

import numpy as np

from foretune.objectives.base import FloatArray


def wpo_weights(chosen: FloatArray, rejected: FloatArray) -> FloatArray:
    """What each pair's loss is multiplied by: near 1 for what the policy itself might say, else near 0.

    Args:
        chosen: mean over the chosen response's tokens of log π(y_t) − log Σ_v π(v)², under the policy as it is, shape
            (n,). The second part makes the weight of a response sampled from the policy about 1.
        rejected: the same of the rejected response.

    >>> float(wpo_weights(np.array(0.0), np.array(0.0)))
    1.0
    """
    return np.exp(chosen + rejected)
