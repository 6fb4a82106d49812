"""Closed forms of early training when margins are linear in the trained weights, m_i = ⟨φ_i, u⟩ (theory T1–T5).

Everything is written in the features φ, so it holds for one-token answers and for longer ones. For the paper's setting
(Yes/No, unembedding only) φ_i = s_i (e_Yes − e_No) ⊗ x_i, hence ‖mean φ‖ = √2‖m‖, = ‖Δ‖/√2 for balanced classes. These
are our own derivations: analogues of the paper's theorems 4.1–4.3, not their statements.

Time is Σ learning rates (t/τ in the paper's notation, τ the inverse learning rate). All objectives enter through
ℓ′(0) and ℓ″(0): −β/2 and β²/4 for DPO.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from foretune.objectives import Objective
from foretune.objectives.base import FloatArray
from foretune.statistics.moments import RowSource, blocks_of, second_moment_norm
from foretune.statistics.samples import mean_of_rows


def slope_at_start(objective: Objective) -> float:
    """ℓ′(0)."""
    return float(objective.slope(np.array(0.0)))


def initial_loss_rate(mean_feature_norm: float, objective: Objective) -> float:
    """dL/dt at t = 0, one behaviour alone (T1): −ℓ′(0)²‖mean φ‖²; for DPO, balanced: −β²‖Δ‖²/8.

    >>> from foretune.objectives import DPO
    >>> initial_loss_rate(2 / 2**0.5, DPO(beta=0.1)).__round__(6)  # ‖Δ‖ = 2
    -0.005
    """
    return -((slope_at_start(objective) * mean_feature_norm) ** 2)


def initial_margin_rate(mean_feature_norm: float, objective: Objective) -> float:
    """d(mean margin)/dt at t = 0 (T1), the margin not multiplied by β: −ℓ′(0)‖mean φ‖²."""
    return -slope_at_start(objective) * mean_feature_norm**2


def weight_change_bound(time: FloatArray, mean_feature_norm: float, objective: Objective) -> FloatArray:
    """Upper bound of ‖ΔW(t)‖ for all t (T2, DPO): |ℓ′(0)|‖mean φ‖t = tβ‖m‖/√2."""
    return np.abs(slope_at_start(objective)) * mean_feature_norm * np.asarray(time)


def loss_drop_bound(time: FloatArray, mean_feature_norm: float, objective: Objective) -> FloatArray:
    """Upper bound of L(0) − L(t) for all t (T2, DPO): ℓ′(0)²‖mean φ‖²t = β²‖m‖²t/2."""
    return -initial_loss_rate(mean_feature_norm, objective) * np.asarray(time)


def linear_deviation(time: FloatArray, features: RowSource, objective: Objective) -> FloatArray:
    """ρ(t): bound of the relative deviation of weight growth from linear (T3): ℓ″(0) λ_max t/2 = β²λt/4.

    λ_max is of (1/n) Σ φφᵀ; the paper's λ, of (1/n) Σ xxᵀ, is half of it.

    Args:
        time: Σ learning rates.
        features: φ, shape (n, dim).
        objective: DPO or another with its largest curvature at 0.
    """
    largest = second_moment_norm(features)
    return float(objective.curvature(np.array(0.0))) * largest / 2 * np.asarray(time)


def second_order_weights(time: FloatArray, features: FloatArray, objective: Objective) -> FloatArray:
    """u(t) of the flow whose loss is ℓ's second-order expansion at 0 (T4): u = H⁺(I − e^{−Ht})g.

    g = −ℓ′(0) mean φ, H = ℓ″(0) (1/n) Σ φφᵀ. Exact for IPO; for DPO good until margins are about 1/β.

    Args:
        time: Σ learning rates, shape (steps,).
        features: φ, shape (n, dim).
        objective: any smooth objective.

    Returns:
        Shape (steps, dim); margins of features Φ are u @ Φᵀ.
    """
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    del left
    eigenvalue = float(objective.curvature(np.array(0.0))) * singular**2 / len(features)
    drive = -slope_at_start(objective) * (right @ features.mean(0))
    times = np.asarray(time, dtype=float)[:, None]
    growth = np.where(
        eigenvalue > 1e-12 * max(eigenvalue.max(initial=0.0), 1e-300),
        -np.expm1(-eigenvalue * times) / np.where(eigenvalue > 0, eigenvalue, 1.0),
        times,
    )
    return (growth * drive) @ right


@dataclass(frozen=True)
class EarlyAccuracy:
    """Reward accuracy of one behaviour alone, early in training, from two classes' moments (T5).

    Hypotheses: Yes/No answers, balanced classes, ΔW still along Δ (ρ small). The Gaussian value needs Gaussian classes,
    Cantelli's bound only their variances.

    Attributes:
        distance: ‖Δ‖.
        offset: c = (‖μ₊‖² − ‖μ₋‖²)/(2‖Δ‖), how unevenly the boundary lies.
        spread_plus: standard deviation of D+ along Δ.
        spread_minus: standard deviation of D− along Δ.
    """

    distance: float
    offset: float
    spread_plus: float
    spread_minus: float

    @classmethod
    def of_classes(cls, plus: RowSource, minus: RowSource) -> "EarlyAccuracy":
        """From the rows of both classes, shapes (n₊, dim) and (n₋, dim), read in blocks."""
        means = [mean_of_rows(rows) for rows in (plus, minus)]
        gap = means[0] - means[1]
        distance = float(np.linalg.norm(gap))
        along = gap / (distance or 1.0)
        offset = float((np.sum(means[0] ** 2) - np.sum(means[1] ** 2)) / (2 * (distance or 1.0)))
        places = [np.concatenate([block @ along for block in blocks_of(rows)]) for rows in (plus, minus)]
        smallest = 1e-12 * max(distance, 1.0)  # a class without any spread is as good as a very small one
        return cls(distance, offset, *(max(float(place.std(ddof=1)), smallest) for place in places))

    def gaussian(self) -> float:
        """Accuracy if both classes are Gaussian: mean of Φ((‖Δ‖/2 ± c)/spread)."""
        return float(
            (
                norm.cdf((self.distance / 2 + self.offset) / self.spread_plus)
                + norm.cdf((self.distance / 2 - self.offset) / self.spread_minus)
            )
            / 2
        )

    def guaranteed(self) -> float:
        """Cantelli's lower bound, for any distribution; 0 for a class whose mean is on the wrong side."""
        share = 0.0
        for room, spread in (
            (self.distance / 2 + self.offset, self.spread_plus),
            (self.distance / 2 - self.offset, self.spread_minus),
        ):
            share += room**2 / (spread**2 + room**2) / 2 if room > 0 else 0.0
        return share


def early_theory(
    features: RowSource, classes: tuple[RowSource, RowSource] | None, objective: Objective, *, time: float
) -> dict[str, float]:
    """What the closed forms say of one behaviour trained alone by gradient flow; all rows, read in blocks.

    Args:
        features: φ of its training pairs, shape (n, dim).
        classes: hidden states of D+ and D−, shapes (n₊, dim) and (n₋, dim), two rows at least; None: no two classes.
        objective: the loss.
        time: Σ learning rates of the run.

    Returns:
        initial_loss_rate and initial_margin_rate per unit of time (T1); weight_change_bound and loss_drop_bound at
        `time` (T2); linear_deviation at `time` (T3; far above 1: growth is no longer linear by then); for Yes/No
        behaviours early_accuracy (Gaussian classes) and guaranteed_accuracy (any distribution) (T5).
    """
    length = float(np.linalg.norm(mean_of_rows(features)))
    found = {
        "initial_loss_rate": initial_loss_rate(length, objective),
        "initial_margin_rate": initial_margin_rate(length, objective),
        "weight_change_bound": float(weight_change_bound(np.array(time), length, objective)),
        "loss_drop_bound": float(loss_drop_bound(np.array(time), length, objective)),
        "linear_deviation": float(linear_deviation(np.array(time), features, objective)),
    }
    if classes is not None:
        accuracy = EarlyAccuracy.of_classes(*classes)
        found |= {"early_accuracy": accuracy.gaussian(), "guaranteed_accuracy": accuracy.guaranteed()}
    return found
