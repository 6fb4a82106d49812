"""Which pairs to look at first: an order whose beginnings have the features of all (kernel herding)."""

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.behaviours import Measured, representatives
from foretune.statistics.moments import FloatArray

# Means over so many rows are nearly those of all, however many there are; the kernel of so many is small.
CANDIDATES = 1000


def representative_rank(measured: Measured) -> NDArray[np.int64]:
    """The place of each pair in the order of its behaviour and split: the first few stand for all; shape (n,).

    Of large behaviours the kernel is of CANDIDATES pairs, drawn by their ids; the others follow them.
    """
    rank = np.empty(len(measured.pair_id), np.int64)
    for split in np.unique(measured.split_of):
        for behaviour in np.unique(measured.behaviour_of[measured.split_of == split]):
            members = measured.members(behaviour, split)
            members = members[np.argsort(measured.pair_id[members], kind="stable")]
            places = np.sort(representatives(measured.pair_id[members], np.zeros(len(members)), CANDIDATES))
            drawn, others = members[places], np.delete(members, places)
            order = np.concatenate([drawn[herded(np.asarray(measured.sketch[drawn]))], others])
            rank[order] = np.arange(len(members))
    return rank


def herded(rows: NDArray) -> NDArray[np.int64]:
    """An order of rows whose first n, for every n, have about the mean feature of all of them.

    Each row in turn is the one that brings the mean feature of those chosen nearest to that of all (Chen, Welling &
    Smola, "Super-Samples from Kernel Herding", 2010), under the kernel ((1 + cosine)/2)²: means, and products of two
    coordinates, of the rows' directions. Whatever such a feature predicts of a row, its mean over the first n is as a
    rule nearer to that of all than over n rows that were drawn. Of equal rows the first comes first.

    Args:
        rows: features, shape (n, dim), in memory: their kernel takes n² numbers.

    Returns:
        Places of rows, shape (n,).

    >>> herded(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    array([0, 1, 2, 3])
    """
    kernel = _kernel(rows)
    wanted, chosen = kernel.mean(1), np.empty(len(rows), np.int64)
    # twice the sum of k(x, ·) over the chosen, plus k(x, x): what adding x does to the squared norm of their sum
    growth = np.diag(kernel).copy()
    for number in range(len(rows)):
        best = int(np.argmin(growth - 2 * (number + 1) * wanted))
        chosen[number] = best
        growth += 2 * kernel[best]
        growth[best] = np.inf
    return chosen


def _kernel(rows: NDArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(norms > 0, norms, 1)
    return ((1 + (directions @ directions.T).astype(float)) / 2) ** 2
