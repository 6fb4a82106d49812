"""Pairs that stand for others: of the same behaviour, with the same preferred answer."""

import numpy as np
from numpy.typing import NDArray

from foretune.errors import UserError
from foretune.verbs.answers import answers_of
from foretune.verbs.prepare import Prepared


def stand_ins(
    prepared: Prepared, measured: NDArray[np.int64], draw: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """For each pair the place in `measured` of itself, or of one with its behaviour and preferred answer.

    Those that stand for others take turns, or are drawn. A ranking is stood for as a whole, by one with as many
    responses.

    Raises:
        UserError: of a behaviour's rankings with some number of responses none was measured.
    """
    pairs, contrasts = prepared.pairs, prepared.contrasts
    place = np.full(len(pairs), -1)
    place[measured] = np.arange(len(measured))
    if contrasts is None:
        # of unpaired rows, desirable ones do not stand for undesirable ones
        answer, units = answers_of(pairs)[0] + 3 * (pairs.lengths[:, 1] == 0), np.arange(len(pairs))
    else:
        answer, units = (contrasts.ranks > 0).sum(1), contrasts.members[:, 0]
    groups = np.stack([pairs.behaviour[units], answer, pairs.is_train[units]], 1)
    for behaviour, preferred, is_train in np.unique(groups, axis=0):
        members = units[(groups == (behaviour, preferred, is_train)).all(1)]
        missing, there = members[place[members] < 0], members[place[members] >= 0]
        if not len(there) and contrasts is not None:
            raise UserError(
                f"of the rankings of {pairs.names[behaviour]} with {preferred} responses none was measured: raise "
                "--twin_pairs."
            )
        if not len(there):  # a rare answer of which nothing was measured
            there = measured[pairs.behaviour[measured] == behaviour]
        turn = np.arange(len(missing)) % len(there) if draw is None else draw.integers(len(there), size=len(missing))
        place[missing] = np.searchsorted(measured, there[turn])
    if contrasts is not None:  # the contrasts of a ranking follow its first one, also among the measured pairs
        there = contrasts.members >= 0
        place[contrasts.members[there]] = (place[units][:, None] + np.arange(there.shape[1]))[there]
    return place
