"""Exact margins of one pair under gradient flow, dm/dt = −κ ℓ′(m), κ = ‖φ‖².

They hold as well for each of many pairs whose features are orthogonal to one another, with κ_i = ‖φ_i‖² w_i / Σ w, and
for pairs with one and the same φ. All arguments broadcast; time is Σ learning rates, margins are in nats.
"""

import numpy as np
from scipy.special import wrightomega

from foretune.objectives import DPO, IPO, SLiC
from foretune.objectives.base import FloatArray


def one_pair_dpo(
    time: FloatArray, kernel: FloatArray, objective: DPO, *, start: FloatArray | float = 0.0
) -> FloatArray:
    """βm(t) = c − ω(c), c = β²κt + βm₀ + e^{βm₀}, ω Wright's omega function (Corless & Jeffrey, 2002).

    From r + e^r = c for r = βm: its derivative is ṙ(1 + e^r) = β²κ, the flow. βm₀ below 700.

    >>> one_pair_dpo(np.array([0.0, 1.0, 100.0]), np.array(2.0), DPO(beta=1.0)).round(4)
    array([0.    , 0.7921, 5.2767])
    """
    scaled = objective.beta * np.asarray(start, dtype=float)
    constant = objective.beta**2 * np.asarray(kernel) * np.asarray(time) + scaled + np.exp(scaled)
    omega = wrightomega(constant).real
    # the same number twice, each where it does not cancel: ω + log ω = c
    late = constant > 1
    return np.where(late, np.log(np.where(late, omega, 1.0)), constant - omega) / objective.beta


def one_pair_ipo(
    time: FloatArray, kernel: FloatArray, objective: IPO, *, start: FloatArray | float = 0.0
) -> FloatArray:
    """m(t) = m* + (m₀ − m*)e^{−2κt}, m* = 1/(2β).

    >>> one_pair_ipo(np.array([0.0, 0.5, 100.0]), np.array(1.0), IPO(beta=0.5)).round(4)
    array([0.    , 0.6321, 1.    ])
    """
    goal = 0.5 / objective.beta
    return goal + (np.asarray(start) - goal) * np.exp(-2 * np.asarray(kernel) * np.asarray(time))


def one_pair_slic(
    time: FloatArray, kernel: FloatArray, objective: SLiC, *, start: FloatArray | float = 0.0
) -> FloatArray:
    """m(t) = min(1/β, m₀ + βκt); m₀ where that is at 1/β or beyond.

    >>> one_pair_slic(np.array([0.0, 1.0, 100.0]), np.array(2.0), SLiC(beta=0.5))
    array([0., 1., 2.])
    """
    kink = 1 / objective.beta
    grown = np.asarray(start) + objective.beta * np.asarray(kernel) * np.asarray(time)
    return np.maximum(np.minimum(kink, grown), start)
