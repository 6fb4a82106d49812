"""Rankings as contrasts: which pairs belong together, in any selection."""

import numpy as np
import pytest

from foretune.dynamics.curves import curve_rows
from foretune.objectives import DPO, Contrasts, Pairwise, PlackettLuce, RankingLoss

CONTRASTS = Contrasts.of(np.array([7, 7, 4, 1, 1]), np.array([1, 2, 1, 1, 1]), np.array([3, 3, 2, 2, 2]))


def test_scores_have_the_last_response_at_zero():
    margins = np.arange(1.0, 6.0)
    assert CONTRASTS.scores(margins).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 0]]
    assert CONTRASTS.ranks.tolist() == [[1, 2, 3], [1, 2, 0], [1, 1, 2]]
    assert CONTRASTS.scores(np.stack([margins, margins])).shape == (2, 3, 3)


def test_some_pairs_keep_their_own_order():
    found = CONTRASTS.within(np.array([3, 4, 0, 1]))
    assert found.members.tolist() == [[0, 1], [2, 3]]
    assert found.ranks.tolist() == [[1, 1, 2], [1, 2, 3]]


def test_ordered_pairs():
    pairs = CONTRASTS.ordered()
    margins = np.array([5.0, 2.0, 1.0, 3.0, 4.0])
    assert pairs.margins(margins).tolist() == [3.0, 5.0, 2.0, 1.0, 3.0, 4.0]
    np.testing.assert_allclose(pairs.share, [1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


def curves(loss, margins, count):
    names, splits = np.full(count, "a", dtype=object), np.full(count, "train", dtype=object)
    reference = np.linspace(-1, 1, count)
    also = {"chosen_displacement": margins, "rejected_displacement": 0 * margins - 2.0}
    weights = np.ones(count)
    row = curve_rows([0], margins, names, splits, loss, reference_margin=reference, weights=weights, also=also)[0]
    return {name: value for name, value in row.items() if not isinstance(value, str)}


def test_curves_count_every_ranking_once():
    margins = np.array([[5.0, -2.0, 1.0, 3.0, 4.0]])
    row = curves(RankingLoss(PlackettLuce(beta=0.1), CONTRASTS), margins, 5)
    expected = PlackettLuce(beta=0.1).value(CONTRASTS.scores(margins), CONTRASTS.ranks).mean()
    assert row["loss"] == pytest.approx(expected)
    assert row["num_pairs"] == 3
    assert row["reward_accuracy"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert row["margin"] == pytest.approx(((7 + 5 - 2) / 3 + 1 + 3.5) / 3)
    assert row["chosen_displacement"] == pytest.approx(((5 + 5 - 2) / 3 + 1 + 3.5) / 3)
    assert row["rejected_displacement"] == pytest.approx(((-2 - 2 - 2) / 3 - 2 - 2) / 3)


def test_curves_of_two_responses_are_those_of_pairs():
    of_two = Contrasts.of(np.arange(4), np.full(4, 1), np.full(4, 2))
    margins = np.array([[5.0, -2.0, 1.0, 3.0]])
    ranked = curves(RankingLoss(Pairwise(base=DPO(beta=0.3)), of_two), margins, 4)
    assert ranked == pytest.approx(curves(DPO(beta=0.3), margins, 4), rel=1e-12)
