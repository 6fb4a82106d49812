"""Pairs that stand for others: of the same behaviour, with the same preferred answer."""

import numpy as np
from numpy.typing import NDArray

from foretune.statistics.behaviours import numbered_answers
from foretune.verbs.prepare import Prepared


def stand_ins(
    prepared: Prepared, measured: NDArray[np.int64], draw: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """For each pair the place in `measured` of itself, or of one with its behaviour and preferred answer.

    Those that stand for others take turns, or are drawn.
    """
    pairs, answer = prepared.pairs, answers_of(prepared)[0]
    place = np.full(len(pairs), -1)
    place[measured] = np.arange(len(measured))
    groups = np.stack([pairs.behaviour, answer, pairs.is_train], 1)
    for behaviour, preferred, is_train in np.unique(groups, axis=0):
        members = np.flatnonzero((groups == (behaviour, preferred, is_train)).all(1))
        missing, there = members[place[members] < 0], members[place[members] >= 0]
        if not len(there):  # a rare answer of which nothing was measured
            there = measured[pairs.behaviour[measured] == behaviour]
        turn = np.arange(len(missing)) % len(there) if draw is None else draw.integers(len(there), size=len(missing))
        place[missing] = np.searchsorted(measured, there[turn])
    return place


def answers_of(prepared: Prepared) -> tuple[np.ndarray, bool]:
    """Each pair's preferred answer (0, 1; −1: free text), and whether all behaviours share one pair of answers."""
    pairs = prepared.pairs
    answer, offered = np.full(len(pairs), -1), []
    tokens = pairs.lengths[:, 1:].sum(1)
    for behaviour in range(len(pairs.names)):
        members = np.flatnonzero(pairs.behaviour == behaviour)
        # pairs that offer the same two answers are equally long: no need to read those that are not
        responses = (
            ((tuple(pair.chosen_ids), tuple(pair.rejected_ids)) for pair in map(pairs.__getitem__, members))
            if np.ptp(tokens[members]) == 0
            else ()
        )
        numbered = numbered_answers(responses)
        offered.append(numbered.options if numbered else None)
        if numbered:
            answer[members] = numbered.preferred
    return answer, offered[0] is not None and all(options == offered[0] for options in offered)
