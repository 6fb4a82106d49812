"""Which of two answers each pair prefers, where a behaviour's pairs all offer the same two."""

import numpy as np

from foretune.models.pairs import EncodedPairs
from foretune.statistics.behaviours import numbered_answers


def answers_of(pairs: EncodedPairs) -> tuple[np.ndarray, bool]:
    """Each pair's preferred answer (0, 1; −1: free text), and whether all behaviours share one pair of answers."""
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
