"""Bounds that hold at all times when margins are linear in the trained weights, m_i = ⟨φ_i, u⟩ (theory T2, T3).

They need a convex loss and gradient flow, or full-batch descent with steps of at most 2/κ (1/κ for lower bounds), κ
the largest curvature of the training loss. Then the gradient never grows, ‖∇L(t)‖ ≤ ‖∇L(0)‖, and shrinks at most by
e^{−κt}; rows of equal weight, or κ and mean φ weighted as they are.
Time is Σ learning rates.
"""

import numpy as np

from foretune.dynamics.closed_form import initial_loss_rate, slope_at_start
from foretune.objectives import Objective
from foretune.objectives.base import FloatArray
from foretune.statistics.moments import RowSource, second_moment_norm


def weight_change_bound(time: FloatArray, mean_feature_norm: float, objective: Objective) -> FloatArray:
    """Upper bound of ‖ΔW(t)‖ for all t (T2): |ℓ′(0)|‖mean φ‖t, for DPO and Yes/No tβ‖m‖/√2.

    >>> from foretune.objectives import DPO
    >>> float(weight_change_bound(np.array(10.0), 2.0, DPO(beta=0.1)))
    1.0
    """
    return np.abs(slope_at_start(objective)) * mean_feature_norm * np.asarray(time)


def loss_drop_bound(time: FloatArray, mean_feature_norm: float, objective: Objective) -> FloatArray:
    """Upper bound of L(0) − L(t) for all t (T2): ℓ′(0)²‖mean φ‖²t, for DPO and Yes/No β²‖m‖²t/2."""
    return -initial_loss_rate(mean_feature_norm, objective) * np.asarray(time)


def loss_drop_floor(time: FloatArray, mean_feature_norm: float, curvature: float, objective: Objective) -> FloatArray:
    """Lower bound of L(0) − L(t) for all t (T2): ℓ′(0)²‖mean φ‖²(1 − e^{−2κt})/(2κ).

    Descent by steps η ≤ 1/κ drops at least as much: there (1 − ηκ)^{2t/η} ≤ e^{−2κt} stands in its place.

    Args:
        time: Σ learning rates.
        mean_feature_norm: ‖mean φ‖.
        curvature: κ, as `largest_curvature`; > 0.
        objective: the loss.

    >>> from foretune.objectives import DPO
    >>> float(loss_drop_floor(np.array(1e9), 2.0, 0.01, DPO(beta=0.1))).__round__(4)
    0.5
    """
    return (
        -initial_loss_rate(mean_feature_norm, objective)
        * -np.expm1(-2 * curvature * np.asarray(time))
        / (2 * curvature)
    )


def largest_curvature(features: RowSource, objective: Objective) -> float:
    """κ = ℓ″(0) λ_max((1/n) Σ φφᵀ): no second derivative of the loss is larger, for losses that curve most at 0.

    For DPO and Yes/No κ = β²λ/2 with λ of (1/n) Σ xxᵀ.

    Args:
        features: φ, shape (n, dim), read in blocks.
        objective: DPO or another with its largest curvature at 0 (`objective_failures` tells).
    """
    return float(objective.curvature(np.array(0.0))) * second_moment_norm(features)


def linear_deviation(time: FloatArray, features: RowSource, objective: Objective) -> FloatArray:
    """ρ(t) = κt/2: bound of the relative deviation of weight growth from linear (T3); for DPO and Yes/No β²λt/4.

    Args:
        time: Σ learning rates.
        features: φ, shape (n, dim).
        objective: DPO or another with its largest curvature at 0.
    """
    return largest_curvature(features, objective) / 2 * np.asarray(time)


def sampling_term(trace: float, count: int, *, failure: float = 0.05) -> float:
    """How far ‖mean φ‖ of n rows is at most from ‖E φ‖, but with probability `failure` (T2 with T7).

    √(tr Σ/(n·failure)), by Chebyshev's inequality: any distribution with a covariance. With ‖E φ‖ + this term for the
    norm, `weight_change_bound` bounds the weight change from the behaviour's own mean and not from that of its sample.

    Args:
        trace: tr Σ of φ within the two answers; for Yes/No and balanced classes tr Σ₊ + tr Σ₋ of the states.
        count: n.
        failure: probability that the statement is false.

    >>> sampling_term(5.0, 100, failure=0.05)
    1.0
    """
    return float(np.sqrt(trace / (count * failure)))


def gaussian_sampling_term(trace: float, concentration: float, count: int, *, failure: float = 0.05) -> float:
    """The same for Gaussian features: √(tr Σ/n) + √(2‖Σ‖ log(1/failure)/n) (Borell, 1975; Tsirelson et al., 1976).

    >>> gaussian_sampling_term(5.0, 1.0, 100, failure=0.05).__round__(4)
    0.4684
    """
    return float(np.sqrt(trace / count) + np.sqrt(2 * concentration * np.log(1 / failure) / count))


# Margins in nats at which a loss's shape is examined.
EXAMINED = np.concatenate([-np.geomspace(1e4, 1e-3, 4000), np.geomspace(1e-3, 1e4, 4000)])


def objective_failures(objective: Objective) -> tuple[str, ...]:
    """Which hypotheses of T2 and T3 this loss does not meet, examined on a grid of margins.

    >>> from foretune.objectives import DPO, SLiC
    >>> objective_failures(DPO(beta=0.1))
    ()
    >>> objective_failures(SLiC(beta=0.1))
    ('the loss has its largest curvature elsewhere than at margin 0',)
    """
    margins = EXAMINED * objective.unit
    slopes, start = objective.slope(margins), float(objective.curvature(np.array(0.0)))
    rises = np.diff(slopes) / np.diff(margins)
    rounding = 1e-9 * (np.abs(slopes).max() / objective.unit + start)
    failed = []
    if (rises < -rounding).any():
        failed.append("the loss is not convex")
    if (rises > start + 1e-6 * start + rounding).any():
        failed.append("the loss has its largest curvature elsewhere than at margin 0")
    return tuple(failed)


def step_failures(learning_rate: float, curvature: float) -> tuple[str, ...]:
    """Whether descent by steps of `learning_rate` breaks T2's limit 2/κ (for DPO and Yes/No 4/(β²λ)).

    >>> step_failures(3.0, 1.0)
    ('the step is too large: learning rate 3, at most 2 keeps the bounds',)
    """
    if learning_rate * curvature <= 2:
        return ()
    return (f"the step is too large: learning rate {learning_rate:.3g}, at most {2 / curvature:.3g} keeps the bounds",)
