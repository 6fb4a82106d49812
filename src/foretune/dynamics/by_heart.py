"""What a simulated run would learn by heart, where few measured pairs stand for many rows.

A step on a row raises its own margin by some c more than those of rows like it. A measured pair that stands for r rows
takes r such steps: the training pairs of a behaviour end about r c above its held-out ones, where those of the real
run end c above them. So 1 − 1/r of the gap is no part of the run, and neither the loss nor what is recorded may see
it. What a pair has beyond the mean of its behaviour is its own too, as far as margins of training pairs vary more than
those of held-out ones. (Our own derivation. That the loss does not see it keeps the steps as large as the real ones.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.moments import FloatArray

# How often along a run the gaps are taken.
TIMES = 20


class ByHeart(NamedTuple):
    """Where the gaps of K behaviours are seen, and whose margins they are part of.

    Attributes:
        sides: of each behaviour one pair for each measured training pair, two or more, and as many held-out ones.
        share: of what its measured pairs learn by heart that is no part of the run: 1 − 1/r; shape (K,).
        owner: the place, among all training pairs of `sides`, of the one that each pair is, or that stands for it; the
            last one and one more where none does; shape (n,).
    """

    sides: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    share: FloatArray
    owner: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        place: NDArray[np.int64],
        rows: NDArray[np.int64],
        observed: NDArray[np.int64],
        behaviour_of: np.ndarray,
        is_train: NDArray[np.bool_],
    ) -> "ByHeart | None":
        """None where each pair stands for itself alone, or too few are held out to tell.

        Args:
            place: the measured pair that each pair is, or that stands for it, shape (n,).
            rows: the pairs that are trained on.
            observed: recorded pairs, held-out ones among them.
            behaviour_of: shape (n,).
            is_train: shape (n,).
        """
        sides, share, owner, known = [], [], np.full(len(place), -1), 0
        for name in np.unique(behaviour_of[rows]):
            own = rows[behaviour_of[rows] == name]
            measured, first = np.unique(place[own], return_index=True)
            held = observed[((behaviour_of == name) & ~is_train)[observed]]
            held = held[np.unique(place[held], return_index=True)[1]]  # the others have no margins of their own
            if len(own) > len(measured) and min(len(measured), len(held)) > 1:
                sides.append((own[first], held))
                share.append(1 - len(measured) / len(own))
                trained = np.flatnonzero((behaviour_of == name) & is_train & np.isin(place, measured))
                owner[trained] = known + np.searchsorted(measured, place[trained])
                known += len(measured)
        return cls(sides, np.array(share), np.where(owner < 0, known, owner)) if sides else None

    @property
    def seen_and_held(self) -> NDArray[np.int64]:
        """The pairs that `shift` wants to know of, side by side."""
        return np.concatenate([side for both in self.sides for side in both])

    def shift(self, learned: FloatArray) -> FloatArray:
        """What is no part of each pair's margin, shape (n,).

        Args:
            learned: what the simulation has added to the margins of `seen_and_held`.
        """
        parts = iter(np.split(learned, np.cumsum([len(side) for both in self.sides for side in both])[:-1]))
        both = [(seen, next(parts)) for seen in parts]
        gap = np.array([seen.mean() - held.mean() for seen, held in both])
        # what measured pairs have of their own is in the gap to be taken off, no noise in it
        noise = np.array([held.var(ddof=1) * (1 / len(seen) + 1 / len(held)) for seen, held in both])
        own = own_part(both)
        found = [
            share * (common + own * (seen - seen.mean()))
            for share, common, (seen, _) in zip(self.share, shrunk(gap, noise), both, strict=True)
        ]
        return np.append(np.concatenate(found), 0.0)[self.owner]


def own_part(both: Sequence[tuple[FloatArray, FloatArray]]) -> float:
    """Of the variance of training pairs within behaviours, the share that held-out pairs do not have.

    By median absolute deviations, which a few far longer texts do not decide.

    Args:
        both: margins of training and of held-out pairs of each behaviour, two or more.

    >>> own_part([(np.array([0.0, 4.0]), np.array([0.0, 2.0]))])
    0.75
    """
    seen, held = (np.mean([_median_deviation(own[side]) ** 2 for own in both]) for side in (0, 1))
    return float(max(1 - held / seen, 0.0)) if seen > 0 else 0.0


def _median_deviation(values: FloatArray) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def shrunk(gap: FloatArray, noise: FloatArray) -> FloatArray:
    """Gaps of K behaviours, nearer to their mean the less of what differs is more than noise (empirical Bayes).

    Args:
        gap: shape (K,).
        noise: their squared standard errors, shape (K,).

    >>> shrunk(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
    array([1., 3.])
    >>> shrunk(np.array([1.0, 3.0]), np.array([9.0, 9.0]))
    array([2., 2.])
    """
    if len(gap) == 1:
        return gap
    spread = max(gap.var(ddof=1) - noise.mean(), 0.0)
    return gap.mean() + (gap - gap.mean()) * spread / np.where(spread + noise > 0, spread + noise, 1.0)
