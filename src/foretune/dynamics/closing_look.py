"""A look at the end of a simulated run: scores of pairs under the model itself, with the weights that were simulated.

Features are taken of few pairs, which stand for the others. The simulated weights can be put into the model, and a
forward pass over the others then says how they differ from those that stand for them. Of the measured pairs both are
known, margins in first order and those looked at: their regression turns what was looked at into what first order would
have said, and where the two disagree, weights that followed stale features have left the model's own way and the look
says nothing. (Our own; a regression estimator, as surveys use it.)
"""

from typing import NamedTuple

import numpy as np

from foretune.dynamics.simulated_run import SimulatedRun
from foretune.statistics.moments import FloatArray

# Share of the variance of simulated margins within behaviours that a look must explain to be believed.
BELIEVED = 0.8


class Look(NamedTuple):
    """What a look at the end of a simulated run has found.

    Attributes:
        missed: what recorded margins lack, 0 for measured pairs; shape (k,).
        explained: share of the variance of the measured pairs' margins within behaviours that it explains.
    """

    missed: FloatArray
    explained: float

    @property
    def believed(self) -> bool:
        """Whether weights and features have kept together."""
        return self.explained >= BELIEVED


def closing_look(
    simulated: FloatArray,
    recorded: FloatArray,
    looked: FloatArray,
    measured: np.ndarray,
    behaviour_of: np.ndarray,
    stands_for: FloatArray,
) -> Look:
    """Compare scores at the end of a run with those that the model has with the simulated weights.

    Args:
        simulated: in first order, of the pair itself or of the one that stands for it: margins, and of a sided loss the
            chosen scores after them, shape (k,), n or 2n.
        recorded: the same less what is learned by heart, shape (k,).
        looked: under the model, shape (k,).
        measured: whether it is the pair itself, shape (n,); some pair of every behaviour is.
        behaviour_of: shape (n,).
        stands_for: r, how many rows its behaviour has for each measured pair; ∞ for pairs that are not trained on;
            shape (n,). Where (1 − 1/r) c is taken off measured pairs, the others lack c/r (`by_heart`).
    """
    owner = np.unique(behaviour_of, return_inverse=True)[1]
    ours, kept, theirs = (scores.reshape(-1, len(owner)) for scores in (simulated, recorded, looked))
    alone = np.where(measured, np.inf, stands_for - 1)
    lacking = [
        _means((whole - rest)[own := measured & np.isfinite(stands_for)], owner[own], owner) / alone
        for whole, rest in zip(ours, kept, strict=True)
    ]
    found = [_look(ours[part], kept[part] - lacking[part], theirs[part], measured, owner) for part in range(len(ours))]
    return Look(np.concatenate([own.missed for own in found]), min(own.explained for own in found))


def _look(
    simulated: FloatArray, recorded: FloatArray, looked: FloatArray, measured: np.ndarray, owner: np.ndarray
) -> Look:
    known = owner[measured]
    means = [_means(scores[measured], known, owner) for scores in (simulated, looked)]
    ours, theirs = simulated - means[0], looked - means[1]
    product, squares = ours[measured] @ theirs[measured], [own[measured] @ own[measured] for own in (ours, theirs)]
    if min(squares) == 0:  # single pairs tell nothing of what differs between pairs
        return Look(np.zeros(len(owner)), 0.0)
    expected = means[0] + product / squares[1] * theirs
    return Look(np.where(measured, 0.0, expected - recorded), float(product**2 / squares[0] / squares[1]))


def _means(values: FloatArray, known: np.ndarray, owner: np.ndarray) -> FloatArray:
    """The mean of each behaviour's known values, 0 of none, for each pair."""
    count, total = (np.bincount(known, weights, minlength=owner.max() + 1) for weights in (None, values))
    return (total / np.maximum(count, 1))[owner]


def with_look(run: SimulatedRun, missed: FloatArray, change: FloatArray, begun: FloatArray | float) -> SimulatedRun:
    """A run with what was missed at the end of the one that was looked at, in proportion to how far margins have come.

    Args:
        run: the same or a similar one, as simulated.
        missed: shape (n,).
        change: of the margins, from the first to the last step of the run that was looked at, as simulated, shape (n,).
        begun: what is missed at the first recorded step, shape (n,).
    """
    come = np.sqrt(np.mean((run.margins - run.margins[0]) ** 2, axis=1))
    reached = np.sqrt(np.mean(change**2))
    share = np.minimum(come / reached, 1.0) if reached else np.zeros(len(come))
    return run._replace(margins=run.margins + share[:, None] * missed + (1 - share)[:, None] * begun)
