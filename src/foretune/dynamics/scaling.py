"""What changes with the number of behaviours that are trained together (the follow-up's scaling law, theory T14).

K behaviours with equally many pairs and scaled margins r = βm under DPO. Where pairs of different behaviours do not act
on one another, K behaviours are one behaviour at 1/K of the speed: r(t; K) = r(t/K; 1), exactly. Time is Σ learning
rates.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from foretune.objectives.base import FloatArray
from foretune.statistics.hypotheses import Checked


class KernelExtremes(NamedTuple):
    """Inner products of the features of pairs.

    Attributes:
        smallest: within behaviours.
        largest: within behaviours.
        crossing: largest magnitude between behaviours, 0 with one behaviour.
    """

    smallest: float
    largest: float
    crossing: float


def kernel_extremes(features: FloatArray, behaviour_of: np.ndarray) -> Checked[KernelExtremes]:
    """The extremes of K_ij = ⟨φ_i, φ_j⟩ that `margin_bounds` takes, and which of its hypotheses they break.

    Args:
        features: φ, shape (n, dim); n² numbers are computed.
        behaviour_of: shape (n,).

    >>> kernel_extremes(np.eye(2), np.array(["a", "b"]))
    Checked(value=KernelExtremes(smallest=1.0, largest=1.0, crossing=0.0), failed=())
    """
    kernel = features @ features.T
    same = behaviour_of[:, None] == behaviour_of
    own = kernel[same]
    counts = np.unique(behaviour_of, return_counts=True)[1]
    found = KernelExtremes(float(own.min()), float(own.max()), float(np.abs(kernel[~same]).max(initial=0.0)))
    failed = []
    if np.ptp(counts):
        failed.append(f"behaviours differ in size: {counts.min()} to {counts.max()} pairs")
    if found.smallest <= 0:
        failed.append(f"pairs of one behaviour pull apart: smallest inner product {found.smallest:.3g}")
    elif (len(counts) - 1) * found.crossing > found.smallest / 2:
        failed.append(f"behaviours are not orthogonal enough: inner products up to {found.crossing:.3g} between them")
    return Checked(found, tuple(failed))


class MarginBounds(NamedTuple):
    """Bounds of every training pair's scaled margin.

    Attributes:
        lower: at the times given.
        upper: at the times given.
        until: the time up to which both hold.
    """

    lower: FloatArray
    upper: FloatArray
    until: float


def margin_bounds(time: FloatArray, extremes: KernelExtremes, behaviours: int, *, beta: float) -> MarginBounds:
    """Bounds of r = βm of every pair until r reaches log 3 at the earliest (T14).

    With κ₋ ≤ K_ij ≤ κ₊ within and |K_ij| ≤ ε between behaviours, (K − 1)ε ≤ κ₋/2:
    β²(κ₋/4 − (K − 1)ε/2)t/K ≤ r ≤ β²(κ₊ + (K − 1)ε)t/(2K) until τ₁ = 2K log 3/(β²(κ₊ + (K − 1)ε)),
    for 1/4 ≤ σ(−r) ≤ 1/2 while 0 ≤ r ≤ log 3. The follow-up's constants 1/8, 5 and log 3/5 are κ₋ = 1/2, κ₊ = 10 and
    ε = 0.

    Args:
        time: Σ learning rates.
        extremes: κ₋, κ₊ and ε.
        behaviours: K.
        beta: β.

    >>> found = margin_bounds(np.array(1.0), KernelExtremes(0.5, 10.0, 0.0), 4, beta=1.0)
    >>> float(found.lower), float(found.upper), round(found.until, 4)  # 4 log 3 / 5
    (0.03125, 1.25, 0.8789)
    """
    across = (behaviours - 1) * extremes.crossing
    slowest = beta**2 * (extremes.smallest / 4 - across / 2) / behaviours
    fastest = beta**2 * (extremes.largest + across) / (2 * behaviours)
    return MarginBounds(slowest * np.asarray(time), fastest * np.asarray(time), float(np.log(3)) / fastest)


def early_test_error(
    behaviours: FloatArray, *, signal: float, spread: float, dim: int, pairs: FloatArray | float = np.inf
) -> FloatArray:
    """Share of unseen pairs with a margin that falls at first, K orthogonal behaviours together (T14).

    Φ(−‖ψ‖²/(σ√(K(‖ψ‖² + dσ²/n)))): weights first move along Σψ̂_k/K, of which behaviour k owns 1/K while noise comes
    through the whole length. For features ψ_k + σz with z Gaussian in d dimensions, d large; it rises with K.

    Args:
        behaviours: K, any shape.
        signal: ‖ψ‖, of each behaviour.
        spread: σ.
        dim: d.
        pairs: n, training pairs a behaviour; ∞: their means are known.

    >>> early_test_error(np.array([1, 4, 16]), signal=2.0, spread=1.0, dim=100).round(4)
    array([0.0228, 0.1587, 0.3085])
    """
    noise = dim * spread**2 / np.asarray(pairs, dtype=float)
    return norm.cdf(-(signal**2) / (spread * np.sqrt(np.asarray(behaviours) * (signal**2 + noise))))


def pairs_needed(
    behaviours: FloatArray, *, signal: float, trace: float, concentration: float, accuracy: float, failure: float = 0.05
) -> FloatArray:
    """Pairs a behaviour that suffice for all K sample means to be known to `accuracy`: Θ(log K) (T14).

    n = (√tr Σ + √(2‖Σ‖ log(K/failure)))²/(accuracy·‖ψ‖)²: the Gaussian sampling term of T2 and a union bound over K.

    Args:
        behaviours: K, any shape.
        signal: ‖ψ‖, of each behaviour.
        trace: tr Σ of its features.
        concentration: ‖Σ‖ of its features.
        accuracy: largest ‖ψ̂_k − ψ_k‖/‖ψ‖ allowed.
        failure: probability that one of the means is further away.

    >>> pairs_needed(np.array([1, 100]), signal=1.0, trace=9.0, concentration=1.0, accuracy=0.5).round(1)
    array([118.7, 190.4])
    """
    reach = np.sqrt(trace) + np.sqrt(2 * concentration * np.log(np.asarray(behaviours) / failure))
    return reach**2 / (accuracy * signal) ** 2
