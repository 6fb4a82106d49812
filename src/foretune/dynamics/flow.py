"""Gradient flow of margins that are linear in the trained weights: du/dt = −(1/Σw) Σ w_i ℓ′(m_i) φ_i, m = Φu."""

import numpy as np
from scipy.integrate import solve_ivp

from foretune.objectives import Objective
from foretune.objectives.base import FloatArray

# Of the velocity, before an adaptive method is given up.
MOST_EVALUATIONS = 10_000
EULER_STEPS = 4096


class _HeldError(Exception):
    """Margins are held at a kink."""


def gradient_flow(
    features: FloatArray,
    weights: FloatArray,
    objective: Objective,
    *,
    times: FloatArray,
    tolerance: float = 1e-7,
) -> FloatArray:
    """Weights u along the flow (theory T0), by an adaptive Runge–Kutta method of order 8.

    Args:
        features: φ of the training pairs, shape (n, dim).
        weights: row weights ≥ 0, shape (n,).
        objective: the loss of a margin.
        times: not decreasing, from 0; in units of Σ learning rates (which stand still where the rate is 0).
        tolerance: relative local error.

    Returns:
        u at each time, shape (len(times), dim). Margins of any pairs are u @ Φᵀ.

    The flow lives in the span of the rows: where those are fewer than the dimensions, it is integrated there. A loss
    with a kink (SLiC's) can hold margins at it, where no adaptive method gets on: then EULER_STEPS equal steps are
    taken, and margins are right to about one step's change.
    """
    moments, place = np.unique(times, return_inverse=True)
    if moments[-1] == 0:
        return np.zeros((len(times), features.shape[1]))
    basis, reduced = _span(features)
    share = weights / weights.sum()

    calls = 0

    def velocity(_: float, position: FloatArray) -> FloatArray:
        nonlocal calls
        calls += 1
        if calls > MOST_EVALUATIONS:
            raise _HeldError
        return -(share * objective.slope(reduced @ position)) @ reduced

    try:
        solution = solve_ivp(
            velocity,
            (0.0, float(moments[-1])),
            np.zeros(reduced.shape[1]),
            method="DOP853",
            t_eval=moments,
            rtol=tolerance,
            atol=tolerance * 1e-3,
        )
        assert solution.success, solution.message
        path = solution.y.T[place]
    except _HeldError:
        rate = float(moments[-1]) / EULER_STEPS
        steps = gradient_descent(reduced, weights, objective, learning_rate=rate, steps=EULER_STEPS)
        path = steps[np.rint(moments / rate).astype(int)][place]
    return path if basis is None else path @ basis


def gradient_descent(
    features: FloatArray, weights: FloatArray, objective: Objective, *, learning_rate: float, steps: int
) -> FloatArray:
    """The same by full-batch descent: u after 0, 1, …, steps; shape (steps + 1, dim)."""
    share = weights / weights.sum()
    path = np.zeros((steps + 1, features.shape[1]))
    for step in range(steps):
        path[step + 1] = path[step] - learning_rate * (share * objective.slope(features @ path[step])) @ features
    return path


def _span(features: FloatArray) -> tuple[FloatArray | None, FloatArray]:
    """An orthonormal basis (n, dim) of the rows' span and the rows in it, when that is smaller."""
    if len(features) >= features.shape[1]:
        return None, features
    basis, triangle = np.linalg.qr(features.T)
    return basis.T, triangle.T
