"""What every objective of a ranking must satisfy."""

import itertools

import numpy as np
import pytest
import torch

from foretune.objectives import DPO, IPO, Pairwise, PlackettLuce, SLiC, TopOne

BETAS = (0.01, 0.1, 2.0)
LOGISTIC = [
    *(kind(beta=beta) for kind in (PlackettLuce, TopOne) for beta in BETAS),
    *(Pairwise(base=DPO(beta=beta)) for beta in BETAS),
]
OBJECTIVES = [*LOGISTIC, Pairwise(base=IPO(beta=0.1)), Pairwise(base=SLiC(beta=0.3))]
SMOOTH = OBJECTIVES[:-1]
# strict, ties above, in the middle and below, and rows with fewer responses (also in between)
RANKS = np.array([[1, 2, 3, 4], [1, 1, 2, 3], [1, 2, 2, 3], [1, 2, 3, 3], [1, 2, 0, 0], [2, 0, 1, 0], [4, 3, 1, 2]])
SCORES = np.random.default_rng(0).normal(size=(len(RANKS), 4)) * [[3.0]]

every = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)


def derivatives(objective, scores, ranks):
    """Slopes and curvature of one ranking, by autograd."""
    own = torch.tensor(ranks)
    leaf = torch.tensor(scores, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda x: objective.torch_value(x, own), leaf)
    curvature = torch.autograd.functional.hessian(lambda x: objective.torch_value(x, own), leaf)
    return slopes, curvature


@every
def test_value_is_the_same_in_torch(objective):
    found = objective.torch_value(torch.tensor(SCORES), torch.tensor(RANKS))
    np.testing.assert_allclose(objective.value(SCORES, RANKS), found, rtol=1e-12)


@every
def test_slopes_are_the_derivatives_of_the_value(objective):
    for scores, ranks, slopes in zip(SCORES, RANKS, objective.slopes(SCORES, RANKS), strict=True):
        np.testing.assert_allclose(slopes, derivatives(objective, scores, ranks)[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("objective", SMOOTH, ids=str)
def test_curvature_is_the_derivative_of_the_slopes(objective):
    for scores, ranks, curvature in zip(SCORES, RANKS, objective.curvature(SCORES, RANKS), strict=True):
        np.testing.assert_allclose(curvature, derivatives(objective, scores, ranks)[1], rtol=1e-7, atol=1e-13)


@every
def test_a_common_shift_changes_nothing(objective):
    np.testing.assert_allclose(objective.value(SCORES + 7.3, RANKS), objective.value(SCORES, RANKS), rtol=1e-9)
    np.testing.assert_allclose(objective.slopes(SCORES, RANKS).sum(-1), 0.0, atol=1e-13)


@every
def test_tied_and_missing_responses_have_no_order_of_their_own(objective):
    scores = np.array([0.4, -1.2, 2.0, 0.1])
    for order in ([0, 2, 1, 3], [3, 1, 2, 0], [2, 0, 3, 1]):
        ranks = np.array([1, 2, 2, 3])
        found = objective.value(scores[order], ranks[order])
        np.testing.assert_allclose(found, objective.value(scores, ranks), rtol=1e-12)
    short = objective.value(scores[:2], np.array([1, 2]))
    for rest in itertools.product([-50.0, 0.0, 1e3], repeat=2):
        assert objective.value(np.array([*scores[:2], *rest]), np.array([1, 2, 0, 0])) == pytest.approx(
            short, rel=1e-12
        )


@every
def test_extreme_scores_stay_finite(objective):
    scores = np.array(list(itertools.product([-1e4, -80.0, 80.0, 1e4], repeat=3)))
    ranks = np.broadcast_to([1, 2, 3], scores.shape)
    for found in (objective.value(scores, ranks), objective.slopes(scores, ranks), objective.curvature(scores, ranks)):
        assert np.isfinite(found).all()
    leaf = torch.tensor(scores, requires_grad=True)
    objective.torch_value(leaf, torch.tensor(ranks.copy())).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("make", [PlackettLuce, TopOne, lambda beta: Pairwise(base=DPO(beta=beta))])
def test_two_responses_are_dpo_to_the_last_bit(make, beta):
    margins = np.linspace(-60, 60, 41)
    scores, ranks = np.stack([margins, 0 * margins], -1), np.broadcast_to([1, 2], (41, 2))
    objective, pair = make(beta=beta), DPO(beta=beta)
    np.testing.assert_array_equal(objective.value(scores, ranks), pair.value(margins))
    np.testing.assert_array_equal(objective.slopes(scores, ranks)[:, 0], pair.slope(margins))
    np.testing.assert_array_equal(objective.curvature(scores, ranks)[:, 0, 0], pair.curvature(margins))
    found = objective.torch_value(torch.tensor(scores), torch.tensor(ranks.copy()))
    np.testing.assert_array_equal(found, pair.torch_value(torch.tensor(margins)))


def test_plackett_luce_is_the_probability_of_the_order():
    scores, beta = np.array([0.3, -1.0, 2.0]), 0.7
    orders = list(itertools.permutations(range(3)))
    values = [PlackettLuce(beta=beta).value(scores[list(order)], np.array([1, 2, 3])) for order in orders]
    assert np.exp(-np.array(values)).sum() == pytest.approx(1.0)


def test_all_tied_teach_nothing():
    scores, ranks = SCORES[:1], np.ones((1, 4), dtype=int)
    for objective in OBJECTIVES:
        assert objective.value(scores, ranks) == 0
        assert not objective.slopes(scores, ranks).any()


@pytest.mark.parametrize("kind", [PlackettLuce, TopOne])
def test_beta_must_be_positive(kind):
    with pytest.raises(ValueError, match="beta must be positive"):
        kind(beta=0.0)
