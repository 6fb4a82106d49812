"""Closed forms of training when margins are linear in the trained weights, m_i = ⟨φ_i, u⟩ (theory T1, T4, T9–T12).

Everything is written in the features φ, so it holds for one-token answers and for longer ones. For the paper's setting
(Yes/No, unembedding only) φ_i = s_i (e_Yes − e_No) ⊗ x_i, hence ‖mean φ‖ = √2‖m‖, = ‖Δ‖/√2 for balanced classes. These
are our own derivations: analogues of the paper's theorems 4.1–4.3, not their statements.

Time is Σ learning rates (t/τ in the paper's notation, τ the inverse learning rate). All objectives enter through
ℓ′(0) and ℓ″(0): −β/2 and β²/4 for DPO.
"""

from typing import NamedTuple

import numpy as np

from foretune.objectives import Objective
from foretune.objectives.base import FloatArray


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
    flat = np.abs(eigenvalue) <= 1e-12 * max(np.abs(eigenvalue).max(initial=0.0), 1e-300)
    # where ℓ″(0) < 0 the expansion grows without bound, in the end beyond all numbers
    with np.errstate(over="ignore"):
        growth = np.where(flat, times, -np.expm1(-eigenvalue * times) / np.where(flat, 1.0, eigenvalue))
    return (growth * drive) @ right


def speed_ratio(aligned: float, base: float) -> float:
    """How much faster flipped labels are learned from an aligned start than from the base model (T9).

    The ratio of the initial loss rates with the same objective, (‖Δ_aligned‖/‖Δ_base‖)²: 1 where features are frozen.

    Args:
        aligned: distinguishability (or ‖mean φ‖) at the aligned model.
        base: the same at the base model, > 0.

    >>> speed_ratio(3.0, 2.0)
    2.25
    """
    return (aligned / base) ** 2


class NoisyRates(NamedTuple):
    """What symmetric label noise or label smoothing does to the initial rates, relative to clean labels (T10).

    Attributes:
        training_loss: factor of the rate of the loss that is trained, in expectation and up to the variance term.
        clean_margin: factor of the rate at which margins of clean labels grow.
    """

    training_loss: float
    clean_margin: float


def label_noise_rates(flipped: float) -> NoisyRates:
    """A share of labels flipped at random: E mean φ shrinks by 1 − 2ε, the trained loss's rate by its square (T10).

    The rate of margins (and of the loss) under clean labels shrinks by 1 − 2ε alone.

    Args:
        flipped: ε, from 0 to 1/2.

    >>> label_noise_rates(0.25)
    NoisyRates(training_loss=0.25, clean_margin=0.5)
    """
    kept = 1 - 2 * flipped
    return NoisyRates(kept**2, kept)


def expected_noisy_square(features: FloatArray, flipped: float) -> float:
    """E‖mean φ‖² over the labels that are flipped, for these very rows (T10): with the term that the n rows add.

    (1 − 2ε)²‖mean φ‖² + 4ε(1 − ε) Σ‖φ_i‖²/n². The second term makes small noisy samples look faster than they are.

    Args:
        features: φ with clean labels, shape (n, dim).
        flipped: ε.

    >>> expected_noisy_square(np.array([[1.0], [1.0]]), 0.5)  # the mean is ±1 or, half of the time, 0
    0.5
    """
    clean = np.sum(features.mean(0) ** 2)
    noise = 4 * flipped * (1 - flipped) * np.sum(features**2) / len(features) ** 2
    return float((1 - 2 * flipped) ** 2 * clean + noise)


def label_smoothing_rates(smoothing: float) -> NoisyRates:
    """The loss (1 − ε)ℓ(m) + εℓ(−m) (cDPO) on clean labels: its slope at 0 is (1 − 2ε)ℓ′(0), as T10 for any ℓ.

    The robust loss ((1 − ε)ℓ(m) − εℓ(−m))/(1 − 2ε) (rDPO) has slope ℓ′(0)/(1 − 2ε) and undoes label noise of ε: the
    margins of clean labels then grow as without noise.

    Args:
        smoothing: ε, from 0 to 1/2.

    >>> label_smoothing_rates(0.1).clean_margin
    0.8
    """
    return label_noise_rates(smoothing)


def chosen_log_prob_change(margin: FloatArray, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
    """Log π(chosen) − log π_ref(chosen) of a one-token answer while only W is trained on Yes/No (T11); exact.

    m/2 − log(1 + p(e^{m/2} − 1) + q(e^{−m/2} − 1)), of the sign of m: there is no likelihood displacement.

    Args:
        margin: m, any shape.
        chosen: p, reference probability of the chosen token, of that shape or one that broadcasts.
        rejected: q, that of the rejected one.

    >>> chosen_log_prob_change(np.array([-1.0, 0.0, 1.0]), np.array(0.3), np.array(0.2)).round(4)
    array([-0.5116,  0.    ,  0.3903])
    """
    half = np.asarray(margin) / 2
    return half - np.log1p(chosen * np.expm1(half) + rejected * np.expm1(-half))


class AdamFirstStep(NamedTuple):
    """What Adam's first step does (T12).

    Attributes:
        weight_change: ‖ΔW‖, in weights.
        margin_change: change of the mean margin, in nats.
    """

    weight_change: float
    margin_change: float


def adam_first_step(
    mean_feature: FloatArray, objective: Objective, *, learning_rate: float, epsilon: float = 1e-8
) -> AdamFirstStep:
    """Adam's first full-batch step, bias-corrected, without weight decay (T12).

    Each coordinate moves by η|g|/(|g| + ε), so ‖ΔW‖ = η√(coordinates) however large Δ is, while the mean margin grows
    by η‖mean φ‖₁; in the paper's setting 2η‖m‖₁.

    Args:
        mean_feature: mean φ in the coordinates of the weights that are trained, any shape; not a sketch of them.
        objective: the loss.
        learning_rate: η.
        epsilon: Adam's own.

    >>> from foretune.objectives import DPO
    >>> adam_first_step(np.array([3.0, -4.0]), DPO(), learning_rate=0.1, epsilon=0.0)  # doctest: +ELLIPSIS
    AdamFirstStep(weight_change=0.1414..., margin_change=0.7...)
    """
    gradient = slope_at_start(objective) * mean_feature
    size = np.abs(gradient)
    step = -learning_rate * gradient / np.where(size > 0, size + epsilon, 1.0)
    return AdamFirstStep(float(np.linalg.norm(step)), float(np.sum(step * mean_feature)))
