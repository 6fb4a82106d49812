"""A ranking of K responses as K − 1 contrasts, each response against the last-ranked one, that have one loss together.

Every loss of a ranking is a function of these margins, because a common shift of all scores changes nothing.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.objectives.base import FloatArray
from foretune.objectives.ranking import RankingObjective, is_worse


class OrderedPairs(NamedTuple):
    """All pairs of responses to one prompt of which one is the better.

    Attributes:
        ranking: whose they are, shape (p,).
        better: the contrast whose chosen response is the better one, shape (p,).
        worse: the contrast of the worse one, −1 where it is the last-ranked response, shape (p,).
        share: one over the number of pairs of the same ranking, shape (p,).
    """

    ranking: NDArray[np.int64]
    better: NDArray[np.int64]
    worse: NDArray[np.int64]
    share: FloatArray

    def of_worse(self, values: FloatArray, last: FloatArray | float = 0.0) -> FloatArray:
        """Values (…, n) of the contrasts at the worse responses; `last` at a last-ranked one, shape (…, p) or one."""
        return np.where(self.worse >= 0, values[..., self.worse], last)

    def margins(self, values: FloatArray) -> FloatArray:
        """Margins (…, n) of the contrasts → of the pairs, (…, p)."""
        return values[..., self.better] - self.of_worse(values)


class Contrasts(NamedTuple):
    """Which pairs belong together: R rankings among n pairs.

    Attributes:
        members: the pairs that are a ranking's contrasts, best response first, −1 at the end of shorter ones; (R, K−1).
        ranks: of its responses, the last-ranked one right after those of `members`, then 0; shape (R, K).
    """

    members: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def of(cls, ranking: np.ndarray, chosen_rank: np.ndarray, rejected_rank: np.ndarray) -> "Contrasts":
        """From three columns of n pairs, in which the contrasts of a ranking follow each other; rankings as they come.

        >>> found = Contrasts.of(np.array([7, 7, 4]), np.array([1, 2, 1]), np.array([2, 2, 2]))
        >>> found.members.tolist(), found.ranks.tolist()
        ([[0, 1], [2, -1]], [[1, 2, 2], [1, 2, 0]])
        """
        start = np.flatnonzero(np.diff(ranking, prepend=~ranking[:1]))
        count = np.diff(np.append(start, len(ranking)))
        place = np.arange(count.max(initial=0))
        members = np.where(place < count[:, None], start[:, None] + place, -1)
        ranks = np.pad(np.where(members >= 0, chosen_rank[members], 0), ((0, 0), (0, 1)))
        ranks[np.arange(len(count)), count] = rejected_rank[start]
        return cls(members, ranks)

    def within(self, pairs: NDArray[np.int64]) -> "Contrasts":
        """The rankings among some pairs (all contrasts of each or none), by their places there, in the order there."""
        place = np.full(self.members.max(initial=-1) + 2, -1)  # the last entry is what −1 finds
        place[pairs] = np.arange(len(pairs))
        first = place[self.members[:, 0]]
        order = np.argsort(first, kind="stable")
        kept = order[first[order] >= 0]
        return Contrasts(place[self.members[kept]], self.ranks[kept])

    def scores(self, margins: FloatArray) -> FloatArray:
        """Scores of all responses less that of the last-ranked one: margins (…, n) → (…, R, K)."""
        found = np.where(self.members >= 0, margins[..., self.members], 0.0)
        return np.concatenate([found, np.zeros_like(found[..., :1])], -1)

    def ordered(self) -> OrderedPairs:
        """All pairs that are not tied."""
        worse = is_worse(self.ranks)
        ranking, better, other = np.nonzero(worse)
        members = np.pad(self.members, ((0, 0), (0, 1)), constant_values=-1)
        share = 1 / worse.sum((1, 2))[ranking]
        return OrderedPairs(ranking, members[ranking, better], members[ranking, other], share)


class RankingLoss(NamedTuple):
    """The loss of n pairs that are the contrasts of rankings."""

    objective: RankingObjective
    contrasts: Contrasts

    def within(self, pairs: NDArray[np.int64]) -> "RankingLoss":
        """The same for the rankings among some pairs."""
        return self._replace(contrasts=self.contrasts.within(pairs))

    def value(self, margins: FloatArray) -> FloatArray:
        """Loss of each ranking: margins (…, n) → (…, R)."""
        return self.objective.value(self.contrasts.scores(margins), self.contrasts.ranks)
