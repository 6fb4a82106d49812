"""Gradient flow by tiny Euler steps, pair by pair."""

import numpy as np


def reference_flow(features, weights, slope, *, time, steps):
    """Weights u at `time`, from u = 0."""
    position = np.zeros(features.shape[1])
    for _ in range(steps):
        velocity = np.zeros_like(position)
        for feature, weight in zip(features, weights, strict=True):
            velocity -= weight / sum(weights) * slope(feature @ position) * feature
        position = position + time / steps * velocity
    return position
