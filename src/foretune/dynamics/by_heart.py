"""What a simulated run would learn by heart, where few measured pairs stand for many rows.

A step on a row raises its own margin by some c more than those of rows like it. A measured pair that stands for r rows
takes r such steps: the training pairs of a behaviour end about r c above its held-out ones, where those of the real
run end c above them. So 1 − 1/r of the gap is no part of the run, and neither the loss nor what is recorded may see
it. What a pair has beyond the mean of its behaviour is its own too, as far as margins of training pairs vary more than
those of held-out ones. (Our own derivation. That the loss does not see it keeps the steps as large as the real ones.)

Rows of which no features are taken are held out of the simulated run as well: without others, the model scores some of
them at each anchor, and between anchors they are taken to learn as measured pairs do.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretune.dynamics.margin_model import NO_PAIRS, Anchored, MarginModel, all_margins
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
        looked: no features are taken of the held-out ones; the model scores them at anchors.
    """

    sides: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    share: FloatArray
    owner: NDArray[np.int64]
    looked: bool = False

    @classmethod
    def of(
        cls,
        place: NDArray[np.int64],
        rows: NDArray[np.int64],
        observed: NDArray[np.int64],
        behaviour_of: np.ndarray,
        is_train: NDArray[np.bool_],
        looked: NDArray[np.int64] = NO_PAIRS,
    ) -> "ByHeart | None":
        """None where each pair stands for itself alone, or too few are held out to tell.

        Args:
            place: the measured pair that each pair is, or that stands for it, shape (n,).
            rows: the pairs that are trained on.
            observed: recorded pairs, held-out ones among them.
            behaviour_of: shape (n,).
            is_train: shape (n,).
            looked: training pairs that are none of the measured ones and are scored at anchors, in place of held-out
                pairs.
        """
        sides, share, owner, known = [], [], np.full(len(place), -1), 0
        for name in np.unique(behaviour_of[rows]):
            own = rows[behaviour_of[rows] == name]
            measured, first = np.unique(place[own], return_index=True)
            if not len(looked):
                held = observed[((behaviour_of == name) & ~is_train)[observed]]
                held = held[np.unique(place[held], return_index=True)[1]]  # the others have no margins of their own
            else:
                held = looked[behaviour_of[looked] == name]
            if len(own) > len(measured) and min(len(measured), len(held)) > 1:
                sides.append((own[first], held))
                share.append(1 - len(measured) / len(own))
                trained = np.flatnonzero((behaviour_of == name) & is_train & np.isin(place, measured))
                owner[trained] = known + np.searchsorted(measured, place[trained])
                known += len(measured)
        if not sides:
            return None
        return cls(sides, np.array(share), np.where(owner < 0, known, owner), len(looked) > 0)

    @property
    def seen(self) -> NDArray[np.int64]:
        """One pair for each measured training pair, behaviour by behaviour."""
        return np.concatenate([seen for seen, _ in self.sides])

    @property
    def held(self) -> NDArray[np.int64]:
        """Held-out pairs, behaviour by behaviour."""
        return np.concatenate([held for _, held in self.sides])

    def shift(self, seen: FloatArray, held: FloatArray) -> FloatArray:
        """What is no part of each pair's margin, shape (n,).

        Args:
            seen: what the simulation has added to the margins of `seen`.
            held: and to those of `held`.
        """
        ends = [np.cumsum([len(both[side]) for both in self.sides])[:-1] for side in (0, 1)]
        both = [*zip(np.split(seen, ends[0]), np.split(held, ends[1]), strict=True)]
        gap = np.array([seen.mean() - held.mean() for seen, held in both])
        # what measured pairs have of their own is in the gap to be taken off, no noise in it
        noise = np.array([held.var(ddof=1) * (1 / len(seen) + 1 / len(held)) for seen, held in both])
        own = own_part(both)
        found = [
            share * (common + own * (seen - seen.mean()))
            for share, common, (seen, _) in zip(self.share, shrunk(gap, noise), both, strict=True)
        ]
        return np.append(np.concatenate(found), 0.0)[self.owner]


class Learned(NamedTuple):
    """What pairs have learned at some step of a simulated run.

    Attributes:
        seen: those of `ByHeart.seen`.
        held: those of `ByHeart.held`; None: they have no features.
    """

    seen: FloatArray
    held: FloatArray | None


class Followed:
    """What pairs learn by heart along one simulated run.

    Args:
        by_heart: whose pairs are followed.
        start: margins around the first anchor.
        parameters: before the first step.
        number: which margins of `start` they are: 0, or n for the chosen scores of n pairs.
    """

    def __init__(
        self, by_heart: ByHeart, start: MarginModel, parameters: Mapping[str, Tensor], number: int = 0
    ) -> None:
        """Nothing is learned yet."""
        self._by_heart, self._number = by_heart, number
        self._begun = self._sides(start, parameters)
        self._at_anchor: tuple[FloatArray, FloatArray] | None = None

    def anchor(self, found: Anchored, parameters: Mapping[str, Tensor]) -> None:
        """Compare both sides at an anchor, before margins are taken up there."""
        if self._by_heart.looked:
            seen, held = self._sides(found, parameters)
            self._at_anchor = seen - self._begun[0], held - self._begun[1]

    def learned(self, model: MarginModel, parameters: Mapping[str, Tensor]) -> Learned:
        """What both sides have learned so far, as far as it is simulated."""
        seen = self._margins(model, parameters, self._by_heart.seen) - self._begun[0]
        if self._by_heart.looked:
            return Learned(seen, None)
        return Learned(seen, self._margins(model, parameters, self._by_heart.held) - self._begun[1])

    def shift(self, learned: Learned) -> FloatArray | None:
        """What is no part of each pair's margin, shape (n,); None: there was no anchor yet to tell."""
        seen, held = learned
        if held is None and self._at_anchor is not None:
            before, held = self._at_anchor
            size = np.sqrt(np.mean(before**2))
            held = held * np.sqrt(np.mean(seen**2)) / size if size else held
        return None if held is None else self._by_heart.shift(seen, held)

    def _sides(self, model: MarginModel, parameters: Mapping[str, Tensor]) -> tuple[FloatArray, FloatArray]:
        seen = self._margins(model, parameters, self._by_heart.seen)
        if not self._by_heart.looked:
            return seen, self._margins(model, parameters, self._by_heart.held)
        pairs, margins = model.looked  # pyright: ignore[reportAttributeAccessIssue]: it is an anchor's
        chosen = len(pairs) if self._number else 0
        return seen, margins[chosen + np.searchsorted(pairs, self._by_heart.held)]

    def _margins(self, model: MarginModel, parameters: Mapping[str, Tensor], pairs: NDArray[np.int64]) -> FloatArray:
        return all_margins(model, parameters, pairs + self._number).double().cpu().numpy()


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
