"""Two runs with stand-ins of either half, told each other's margins: SGD, step by step, pair by pair."""

import numpy as np


def coupled_runs(features, place, batches, slope, *, learning_rate, max_norm=None):
    """Margins of the measured pairs after all batches, read where they stand for none; shape (m,).

    Args:
        features: of the measured pairs, shape (m, dim); margins are linear in them and start at 0.
        place: the measured pair that each row is, or that stands for it in each half, shape (2, n).
        batches: rows of each step.
        slope: derivative of the loss.
        learning_rate: of SGD.
        max_norm: largest norm of a half's gradient.
    """
    weights = [np.zeros(features.shape[1]), np.zeros(features.shape[1])]
    stands = [{place[half][row] for row in range(place.shape[1]) if place[0][row] != place[1][row]} for half in (0, 1)]

    def margin(pair, half):
        reads = 1 - half if pair in stands[half] else half
        return features[pair] @ weights[reads]

    for batch in batches:
        steps = []
        for half in (0, 1):
            pairs = [place[half][row] for row in batch]
            gradient = sum(slope(margin(pair, half)) * features[pair] for pair in pairs) / len(batch)
            if max_norm is not None:
                gradient = gradient * min(1.0, max_norm / np.linalg.norm(gradient))
            steps.append(learning_rate * gradient)
        weights = [own - step for own, step in zip(weights, steps, strict=True)]
    found = []
    for pair in range(len(features)):
        halves = [half for half in (0, 1) if pair not in stands[half]]
        found.append(np.mean([features[pair] @ weights[half] for half in halves]))
    return np.array(found)
