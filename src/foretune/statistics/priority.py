"""How behaviours that are trained together help and hurt one another (Im & Li, 2024, section 5; theory T8)."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from foretune.statistics.moments import FloatArray, RowSource, blocks_of


class BehaviourKernel(NamedTuple):
    """The behaviours' mean features against each other.

    Attributes:
        behaviours: their names, K of them.
        matrix: G_jk = ⟨mean φ_j, mean φ_k⟩, shape (K, K).
        weights: π, each behaviour's share of the training weight, shape (K,), sum 1.
    """

    behaviours: list[str]
    matrix: FloatArray
    weights: FloatArray


def behaviour_kernel(
    features: RowSource, behaviour_of: np.ndarray, weights: FloatArray, *, behaviours: list[str]
) -> BehaviourKernel:
    """The kernel of `behaviours` from row features (n, dim), their behaviours (n,) and row weights (n,); one pass."""
    number = {behaviour: index for index, behaviour in enumerate(behaviours)}
    owner = np.array([number[behaviour] for behaviour in behaviour_of], dtype=np.int64)
    sums, place = np.zeros((len(behaviours), features.shape[1])), 0
    for block in blocks_of(features):
        here = slice(place, place + len(block))
        for index in np.unique(owner[here]):
            mine = owner[here] == index
            sums[index] += weights[here][mine] @ block[mine]
        place += len(block)
    shares = np.bincount(owner, weights=weights, minlength=len(behaviours))
    means = sums / np.where(shares > 0, shares, 1.0)[:, None]
    return BehaviourKernel(behaviours, means @ means.T, shares / shares.sum())


def priority_levels(kernel: BehaviourKernel) -> FloatArray:
    """p_k = ⟨b̄, Δ_k⟩/‖b̄‖ with b̄ = Σ π_j Δ_j, shape (K,): the larger, the sooner k is learned in the mixture.

    The paper's priority level where `kernel` is of the Δ_k = μ₊ − μ₋ and all shares are equal. Zero everywhere where
    the behaviours cancel exactly.

    >>> priority_levels(BehaviourKernel(["a", "b"], np.eye(2), np.array([0.5, 0.5]))).round(4)
    array([0.7071, 0.7071])
    """
    pull = kernel.matrix @ kernel.weights
    length = np.sqrt(max(kernel.weights @ pull, 0.0))
    return pull / length if length else np.zeros_like(pull)


def priority_gaps(kernel: BehaviourKernel) -> FloatArray:
    """The paper's gap(j, k) = (p_j − p_k)/max_k ‖Δ_k‖, shape (K, K): the larger, the more j is learned before k.

    Zero everywhere where all Δ vanish.

    >>> priority_gaps(BehaviourKernel(["a", "b"], np.diag([1.0, 4.0]), np.array([0.5, 0.5]))).round(4)
    array([[ 0.    , -0.6708],
           [ 0.6708,  0.    ]])
    """
    levels = priority_levels(kernel)
    longest = np.sqrt(np.diag(kernel.matrix).max())
    return (levels[:, None] - levels) / (longest or 1.0)


def differences_kernel(differences: FloatArray, weights: FloatArray, *, behaviours: list[str]) -> BehaviourKernel:
    """The kernel of the Δ_k themselves, (K, dim), as in the paper; behaviours whose Δ is NaN have no part in it."""
    known = np.isfinite(differences).all(axis=1)
    shares = np.where(known, weights, 0.0)
    filled = np.where(np.isfinite(differences) & known.reshape(-1, 1), differences, 0.0)
    return BehaviourKernel(behaviours, filled @ filled.T, shares / shares.sum() if shares.any() else shares)


def initial_rates(kernel: BehaviourKernel) -> FloatArray:
    """(Gπ)_k, shape (K,): −dL_k/dt at the start, up to the objective's ℓ′(0)²; negative: un-learned at first (T8)."""
    return kernel.matrix @ kernel.weights


def equal_rate_mixture(kernel: BehaviourKernel) -> FloatArray:
    """The mixture π ≥ 0, Σπ = 1, under which all behaviours start equally fast: Gπ ∝ 1 (T8).

    Where no such mixture exists, the non-negative one whose Gπ is nearest to 1 in least squares. K zeros only if every
    behaviour's mean feature vanishes.

    >>> equal_rate_mixture(BehaviourKernel(["a", "b"], np.diag([1.0, 3.0]), np.array([0.5, 0.5]))).round(3)
    array([0.75, 0.25])
    """
    scale = np.abs(kernel.matrix).max()
    if scale == 0:
        return np.zeros(len(kernel.behaviours))
    mixture, _ = nnls(kernel.matrix / scale, np.ones(len(kernel.behaviours)))
    return mixture / mixture.sum() if mixture.sum() else mixture


def equal_rate_failures(kernel: BehaviourKernel, mixture: FloatArray) -> tuple[str, ...]:
    """Which behaviours do not start as fast as the mixture's average, by more than a thousandth of it, in words.

    Args:
        kernel: of the behaviours.
        mixture: of `equal_rate_mixture`, shape (K,).

    >>> opposed = BehaviourKernel(["a", "b"], np.array([[1.0, -2.0], [-2.0, 9.0]]), np.array([0.5, 0.5]))
    >>> equal_rate_failures(opposed, equal_rate_mixture(opposed))
    ()
    >>> crowded = BehaviourKernel(["a", "b"], np.array([[1.0, 2.0], [2.0, 9.0]]), np.array([0.5, 0.5]))
    >>> equal_rate_failures(crowded, equal_rate_mixture(crowded))
    ('no mixture starts b at the common rate',)
    """
    rates = kernel.matrix @ mixture
    common = float(mixture @ rates)
    uneven = [name for name, rate in zip(kernel.behaviours, rates, strict=True) if abs(rate - common) > 1e-3 * common]
    return (f"no mixture starts {', '.join(uneven)} at the common rate",) if uneven else ()
