"""Features of rankings against a loop over their pairs."""

import numpy as np

from foretune.objectives import DPO, Contrasts, Pairwise
from foretune.statistics.behaviours import Measured
from foretune.statistics.rankings import measured_rankings


def test_features_are_means_over_pairs_that_are_not_tied():
    rng = np.random.default_rng(0)
    ranking = np.array([5, 5, 5, 2, 2, 9])
    contrasts = Contrasts.of(ranking, np.array([1, 2, 3, 1, 1, 1]), np.array([3, 3, 3, 2, 2, 2]))
    responses = {ranking: rng.normal(size=(4, 7)) for ranking in (5, 2, 9)}  # states and, in their place, gradients
    lasts = {5: 3, 2: 2, 9: 1}
    place = [0, 1, 2, 0, 1, 0]
    chosen = np.array([responses[owner][k] for owner, k in zip(ranking, place, strict=True)])
    rejected = np.array([responses[owner][lasts[owner]] for owner in ranking])
    behaviour = np.array(["a", "a", "a", "b", "b", "a"], dtype=object)
    split, weights = np.full(6, "train", dtype=object), ranking.astype(float)
    given = Measured(
        behaviour, split, weights, np.zeros(6, int), chosen, chosen, rejected, chosen - rejected, chosen, np.arange(6)
    )
    found = measured_rankings(given, contrasts.members, contrasts.ranks)
    np.testing.assert_array_equal(found.behaviour_of, ["a", "b", "a"])
    np.testing.assert_array_equal(found.weights, [5, 2, 9])
    for row, (owner, ranks) in enumerate(zip((5, 2, 9), ([1, 2, 3, 3], [1, 1, 2], [1, 2]), strict=True)):
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        better, worse = (np.mean([responses[owner][pair[side]] for pair in pairs], axis=0) for side in (0, 1))
        np.testing.assert_allclose(found.chosen_mean[[row]][0], better)
        np.testing.assert_allclose(found.rejected_mean[[row]][0], worse)
        np.testing.assert_allclose(found.sketch[[row]][0], better - worse)
    slopes = Pairwise(base=DPO(beta=2.0)).slopes(np.zeros(contrasts.ranks.shape), contrasts.ranks)[:, :-1]
    gradient = np.einsum("rk,rkd->rd", slopes * (contrasts.members >= 0), (chosen - rejected)[contrasts.members])
    np.testing.assert_allclose(found.kernel_features[:], -gradient)  # the pairwise loss's own gradient, over β/2
