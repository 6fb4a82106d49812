"""Which rows early training gets right, and when (theory T5, T6)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from foretune.dynamics.bounds import largest_curvature
from foretune.dynamics.closed_form import slope_at_start
from foretune.objectives import Objective
from foretune.objectives.base import FloatArray
from foretune.statistics.moments import RowSource, blocks_of
from foretune.statistics.samples import mean_of_rows


@dataclass(frozen=True)
class EarlyAccuracy:
    """Reward accuracy of one behaviour alone, early in training, from two classes' moments (T5).

    Hypotheses: Yes/No answers, balanced classes, ΔW still along Δ (ρ small), rows that were not trained on (or so many
    that no single one matters). The Gaussian value needs Gaussian classes, the exponential bound their tails,
    Cantelli's only their variances. A class whose mean lies on the wrong side is guaranteed nothing.

    >>> known = EarlyAccuracy(distance=4.0, offset=0.0, spread_plus=1.0, spread_minus=1.0)
    >>> round(known.gaussian(), 4), known.guaranteed()
    (0.9772, 0.8)
    >>> round(known.subexponential(alphas=(2.0, 2.0), norms=((8 / 3) ** 0.5, (8 / 3) ** 0.5)), 4)
    0.5537

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

    @property
    def rooms(self) -> tuple[float, float]:
        """How far the mean of D+ and that of D− lie on their own side of the boundary: ‖Δ‖/2 + c and ‖Δ‖/2 − c."""
        return self.distance / 2 + self.offset, self.distance / 2 - self.offset

    def gaussian(self) -> float:
        """Accuracy if both classes are Gaussian: mean of Φ(room/spread)."""
        spreads = self.spread_plus, self.spread_minus
        return float(np.mean([norm.cdf(room / spread) for room, spread in zip(self.rooms, spreads, strict=True)]))

    def guaranteed(self) -> float:
        """Lower bound for any distribution: mean of room²/(spread² + room²) (Cantelli)."""
        spreads = self.spread_plus, self.spread_minus
        return float(
            np.mean(
                [max(room, 0.0) ** 2 / (spread**2 + room**2) for room, spread in zip(self.rooms, spreads, strict=True)]
            )
        )

    def subexponential(self, *, alphas: tuple[float, float], norms: tuple[float, float]) -> float:
        """Lower bound for α-subexponential classes: mean of max(0, 1 − 2 exp(−(room/K)^α)).

        Args:
            alphas: α of D+ and of D−, such that P(|⟨x − μ, Δ̂⟩| > s) ≤ 2 exp(−(s/K)^α).
            norms: K of D+ and of D− (`foretune.statistics.tails` estimates both).
        """
        heights = [
            (max(room, 0.0) / size) ** alpha for room, size, alpha in zip(self.rooms, norms, alphas, strict=True)
        ]
        return float(np.mean([max(0.0, 1 - 2 * np.exp(-height)) for height in heights]))


def certain_share(time: FloatArray, features: RowSource, rows: RowSource, objective: Objective) -> FloatArray:
    """Lower bound of the reward accuracy over `rows` at each time, without any probability (T5).

    A row's margin is positive while cos(φ_i, mean φ) > ρ(t), for the weights are within ρ(t) of their first direction
    (T3).

    Args:
        time: Σ learning rates, shape (steps,).
        features: φ of the training rows, shape (n, dim).
        rows: φ of the rows that are judged, shape (m, dim), trained on or not.
        objective: convex, with its largest curvature at 0.

    Returns:
        Shape (steps,).
    """
    mean = mean_of_rows(features)
    cosines = np.concatenate([block @ mean / _lengths(block, mean) for block in blocks_of(rows)])
    deviation = largest_curvature(features, objective) / 2 * np.asarray(time)
    return (cosines > deviation[:, None]).mean(1)


def _lengths(rows: FloatArray, mean: FloatArray) -> FloatArray:
    found = np.linalg.norm(rows, axis=1) * np.linalg.norm(mean)
    return np.where(found > 0, found, np.inf)


class FlipTimes(NamedTuple):
    """When rows change to the other output answer; Σ learning rates, shape (m,) each, ∞ where never.

    Attributes:
        expected: in first order; ∞ for rows that at first move away.
        earliest: not before this.
        latest: by this time at the latest; ∞ where nothing certain can be said.
    """

    expected: FloatArray
    earliest: FloatArray
    latest: FloatArray


def flip_times(features: RowSource, rows: FloatArray, reference_margin: FloatArray, objective: Objective) -> FlipTimes:
    """When the model's likelier answer changes: the first t with margin = −reference margin (T6 with T3).

    In first order m_i(t) = −ℓ′(0)⟨φ_i, mean φ⟩t, and T3 puts the true one within −ℓ′(0)‖φ_i‖‖mean φ‖κt²/2 of it; both
    ends are quadratic in t. Rows with a negative reference margin are learned, those with a positive one un-learned.

    Args:
        features: φ of the training rows, shape (n, dim).
        rows: φ of the rows that are judged, shape (m, dim).
        reference_margin: log π_ref(chosen) − log π_ref(rejected) of them, shape (m,).
        objective: convex, with its largest curvature at 0.

    >>> from foretune.objectives import DPO
    >>> one = np.array([[1.0, 0.0]])
    >>> [float(when[0].round(3)) for when in flip_times(one, one, np.array([-0.1]), DPO(beta=1.0))]
    [0.2, 0.195, 0.205]
    """
    mean, slope = mean_of_rows(features), -slope_at_start(objective)
    toward = -np.sign(reference_margin)
    speed = slope * toward * (rows @ mean)
    reach = slope * np.linalg.norm(rows, axis=1) * np.linalg.norm(mean) * largest_curvature(features, objective) / 2
    need = np.abs(reference_margin)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(speed > 0, need / np.maximum(speed, 0.0), np.inf)
        # the roots of speed·t ± reach·t² = need, in the form that does not cancel
        root = np.sqrt(speed**2 + 4 * reach * need)
        earliest = np.where(speed >= 0, 2 * need / (speed + root), (root - speed) / (2 * reach))
        inside = speed**2 - 4 * reach * need
        latest = np.where((speed > 0) & (inside >= 0), 2 * need / (speed + np.sqrt(np.maximum(inside, 0.0))), np.inf)
    return FlipTimes(expected, np.where(np.isnan(earliest), np.inf, earliest), latest)
