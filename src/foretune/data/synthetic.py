"""Behaviours whose means, covariances, overlaps and tails are known: what estimates and bounds are tested on.

A behaviour is two distributions of hidden states: of prompts whose preferred answer is Yes and of those where it is No;
or, for free text, of the mean states over chosen and over rejected responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import gamma, ive
from scipy.stats import gennorm, vonmises_fisher

from foretune.errors import UserError

FloatArray = NDArray[np.float64]


class States(Protocol):
    """A distribution of hidden states."""

    @property
    def mean(self) -> FloatArray:
        """Shape (dim,)."""
        ...

    @property
    def covariance(self) -> FloatArray:
        """Shape (dim, dim)."""
        ...

    def draw(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Independent states, shape (count, dim)."""
        ...


@dataclass(frozen=True)
class ExponentialPower:
    """States μ + Az, the coordinates of z independent with variance 1 and density ∝ exp(−|z/a|^α) (Subbotin, 1923).

    Attributes:
        mean: μ, shape (dim,).
        mixing: A, shape (dim, dim); the covariance is AAᵀ.
        alpha: tail index of z: 2 Gaussian, 1 two-sided exponential, below 1 of Weibull type.

    >>> ExponentialPower(np.zeros(2), 3 * np.eye(2), alpha=1.0).covariance
    array([[9., 0.],
           [0., 9.]])
    """

    mean: FloatArray
    mixing: FloatArray
    alpha: float = 2.0

    @property
    def covariance(self) -> FloatArray:
        """AAᵀ."""
        return self.mixing @ self.mixing.T

    @property
    def norm(self) -> float:
        """K of one coordinate of z: P(|z| > s) ≤ 2 exp(−(s/K)^α), the Orlicz norm a(1 − 2^{−α})^{−1/α}."""
        return self._scale * (1 - 2.0**-self.alpha) ** (-1 / self.alpha)

    def draw(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Independent states, shape (count, dim)."""
        z = gennorm.rvs(self.alpha, scale=self._scale, size=(count, len(self.mean)), random_state=generator)
        return self.mean + z @ self.mixing.T

    @property
    def _scale(self) -> float:
        """The a that gives z variance 1."""
        return float(np.sqrt(gamma(1 / self.alpha) / gamma(3 / self.alpha)))


@dataclass(frozen=True)
class VonMisesFisher:
    """States on the unit sphere, density ∝ exp(κ⟨μ, x⟩) (Fisher, 1953): as normalised states are.

    Attributes:
        direction: μ, of length 1, shape (dim,), dim at least 2.
        concentration: κ > 0.

    >>> round(float(VonMisesFisher(np.array([0.0, 0.0, 1.0]), 2.0).mean[2]), 4)  # coth κ − 1/κ in three dimensions
    0.5373
    """

    direction: FloatArray
    concentration: float

    @property
    def mean(self) -> FloatArray:
        """Aμ, with A = I_{d/2}(κ)/I_{d/2−1}(κ)."""
        return self._resultant * self.direction

    @property
    def covariance(self) -> FloatArray:
        """(A/κ)(I − μμᵀ) + (1 − A² − (d − 1)A/κ) μμᵀ."""
        dim, resultant = len(self.direction), self._resultant
        across, line = resultant / self.concentration, np.outer(self.direction, self.direction)
        return across * (np.eye(dim) - line) + (1 - resultant**2 - (dim - 1) * across) * line

    def draw(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Independent states, shape (count, dim)."""
        kind = vonmises_fisher(self.direction, self.concentration)  # pyright: ignore[reportArgumentType]
        return kind.rvs(count, random_state=generator)

    @property
    def _resultant(self) -> float:
        half = len(self.direction) / 2
        return float(ive(half, self.concentration) / ive(half - 1, self.concentration))


class YesNoStates(NamedTuple):
    """A sample of a behaviour with two one-token answers.

    Attributes:
        states: shape (n, dim).
        is_plus: which prefer Yes, shape (n,).
    """

    states: FloatArray
    is_plus: NDArray[np.bool_]

    @property
    def features(self) -> FloatArray:
        """φ = √2 s x, shape (n, dim), as `statistics.behaviours.yes_no_features`."""
        return np.sqrt(2.0) * np.where(self.is_plus, 1.0, -1.0)[:, None] * self.states


class ResponseStates(NamedTuple):
    """A sample of a behaviour with free responses.

    Attributes:
        chosen: mean states over the chosen responses, shape (n, dim).
        rejected: the same of the rejected ones.
    """

    chosen: FloatArray
    rejected: FloatArray


@dataclass(frozen=True)
class SyntheticBehaviour:
    """A behaviour all of whose figures are known.

    Attributes:
        plus: of states that prefer Yes, or of chosen responses.
        minus: of states that prefer No, or of rejected responses.
    """

    plus: States
    minus: States

    @property
    def difference(self) -> FloatArray:
        """Δ = μ₊ − μ₋, shape (dim,); its length is the distinguishability."""
        return self.plus.mean - self.minus.mean

    @property
    def concentration(self) -> float:
        """The larger ‖Σ‖_op."""
        return max(float(np.linalg.norm(side.covariance, 2)) for side in (self.plus, self.minus))

    @property
    def trace(self) -> float:
        """The larger tr Σ."""
        return max(float(np.trace(side.covariance)) for side in (self.plus, self.minus))

    def yes_no(self, yes: int, no: int, generator: np.random.Generator) -> YesNoStates:
        """Pairs with one-token answers, those that prefer Yes first."""
        states = np.concatenate([self.plus.draw(yes, generator), self.minus.draw(no, generator)])
        return YesNoStates(states, np.arange(yes + no) < yes)

    def responses(self, count: int, generator: np.random.Generator) -> ResponseStates:
        """Pairs with free responses."""
        return ResponseStates(self.plus.draw(count, generator), self.minus.draw(count, generator))


def overlapping_differences(lengths: Sequence[float], *, overlap: float, dim: int) -> FloatArray:
    """Δ of K behaviours with the lengths given and the same cosine between any two, shape (K, dim).

    Args:
        lengths: ‖Δ_k‖, K of them.
        overlap: cosine of the angle between any two, from −1/(K − 1) to 1.
        dim: at least K.

    Raises:
        UserError: no such directions exist.

    >>> differences = overlapping_differences([1.0, 2.0], overlap=0.5, dim=3)
    >>> (differences @ differences.T).round(6)
    array([[1., 1.],
           [1., 4.]])
    """
    count = len(lengths)
    if dim < count:
        raise UserError(f"{count} behaviours have a given overlap in {count} dimensions or more, got {dim}.")
    cosines = np.full((count, count), overlap) + (1 - overlap) * np.eye(count)
    values, vectors = np.linalg.eigh(cosines)
    if values.min() < -1e-9:
        raise UserError(
            f"no {count} directions have a cosine of {overlap} to one another; take at least −1/{count - 1}."
        )
    found = np.zeros((count, dim))
    found[:, :count] = np.asarray(lengths)[:, None] * (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return found


def symmetric_behaviour(
    difference: FloatArray, *, spread: float = 1.0, alpha: float = 2.0, offset: FloatArray | float = 0.0
) -> SyntheticBehaviour:
    """A behaviour with means `offset` ± Δ/2 and independent coordinates of the same spread.

    >>> symmetric_behaviour(np.array([3.0, 4.0]), spread=2.0).trace
    8.0
    """
    sides = [
        ExponentialPower(offset + sign * difference / 2, spread * np.eye(len(difference)), alpha) for sign in (1, -1)
    ]
    return SyntheticBehaviour(*sides)
