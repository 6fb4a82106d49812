"""Many small training problems at once: one array operation for all of them."""

from typing import NamedTuple

import numpy as np


class ManyPaths(NamedTuple):
    """Training of P problems of n rows and d weights, at T moments.

    Attributes:
        times: Σ learning rates, shape (T, P).
        weights: shape (T, P, d).
    """

    times: np.ndarray
    weights: np.ndarray


def random_problems(seed, *, problems, rows, dim):
    """Features (P, n, d) of very different scales, means, spreads and outliers."""
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 3, (problems, 1, 1))
    noise = generator.normal(size=(problems, rows, dim))
    noise = np.where(kind == 1, noise**3, np.where(kind == 2, np.sign(noise), noise))
    mean = generator.normal(size=(problems, 1, dim)) * 10 ** generator.uniform(-2, 1, (problems, 1, 1))
    return (mean + noise * 10 ** generator.uniform(-1, 0.5, (problems, 1, dim))) * 10 ** generator.uniform(
        -1, 1, (problems, 1, 1)
    )


def mean_gradient(features, weights, slope):
    """∇L of every problem, shape (P, d)."""
    margins = np.einsum("pnd,pd->pn", features, weights)
    return np.einsum("pn,pnd->pd", slope(margins), features) / features.shape[1]


def largest_eigenvalues(features):
    """λ_max of (1/n) Σ φφᵀ, shape (P,)."""
    return np.linalg.norm(features, 2, axis=(1, 2)) ** 2 / features.shape[1]


def descend(features, slope, *, rates, steps):
    """Full-batch descent at the rate of each problem, (P,): steps + 1 moments."""
    weights = np.zeros((steps + 1, len(features), features.shape[2]))
    for step in range(steps):
        weights[step + 1] = weights[step] - rates[:, None] * mean_gradient(features, weights[step], slope)
    return ManyPaths(rates * np.arange(steps + 1)[:, None], weights)


def flow(features, slope, *, ends, steps):
    """Gradient flow up to the end of each problem, (P,), by the classical Runge–Kutta method on a quadratic grid."""
    grid = (np.arange(steps + 1) / steps)[:, None] ** 2 * ends
    weights = np.zeros((steps + 1, len(features), features.shape[2]))
    for step in range(steps):
        width, here = (grid[step + 1] - grid[step])[:, None], weights[step]
        first = -mean_gradient(features, here, slope)
        second = -mean_gradient(features, here + width / 2 * first, slope)
        third = -mean_gradient(features, here + width / 2 * second, slope)
        fourth = -mean_gradient(features, here + width * third, slope)
        weights[step + 1] = here + width / 6 * (first + 2 * second + 2 * third + fourth)
    return ManyPaths(grid, weights)
