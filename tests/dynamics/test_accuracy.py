"""Accuracy guarantees and flip times against many trainings, and their probabilities against many draws."""

import numpy as np
import pytest
from tests.reference.many_problems import flow, largest_eigenvalues, random_problems

from foretune.data.synthetic import SyntheticBehaviour, VonMisesFisher, symmetric_behaviour
from foretune.dynamics.accuracy import EarlyAccuracy, certain_share, flip_times
from foretune.dynamics.flow import gradient_flow
from foretune.objectives import DPO

OBJECTIVE = DPO(beta=0.5)
FEATURES = random_problems(5, problems=10_000, rows=5, dim=3)


def curvature_of(features):
    return largest_eigenvalues(features) * OBJECTIVE.beta**2 / 4


@pytest.fixture(scope="module")
def trained():
    path = flow(FEATURES, OBJECTIVE.slope, ends=4 / curvature_of(FEATURES), steps=80)
    return path, np.einsum("pnd,tpd->tpn", FEATURES, path.weights)


def test_rows_that_are_certain_have_positive_margins_in_10000_trainings(trained):
    path, margins = trained
    lengths = np.linalg.norm(FEATURES, axis=2) * np.linalg.norm(FEATURES.mean(1), axis=1)[:, None]
    cosines = np.einsum("pnd,pd->pn", FEATURES, FEATURES.mean(1)) / lengths
    certain = cosines > (curvature_of(FEATURES) / 2 * path.times)[:, :, None]
    assert 0.1 < certain[1:].mean() < 0.9
    assert (certain[1:] & (margins[1:] <= 0)).sum() == 0
    for problem in range(3):
        found = certain_share(path.times[:, problem], FEATURES[problem], FEATURES[problem], OBJECTIVE)
        np.testing.assert_allclose(found, certain[:, problem].mean(1))


def test_a_row_without_features_is_never_certain():
    rows = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert certain_share(np.array([0.0]), rows, rows, OBJECTIVE).tolist() == [0.5]


def test_rows_flip_within_their_times_in_10000_trainings(trained):
    path, margins = trained
    generator = np.random.default_rng(6)
    reach = np.abs(margins).max((0, 2))[:, None]
    reference = reach * generator.uniform(-0.5, 0.5, FEATURES.shape[:2])
    # a row that has flipped may flip back
    flipped = np.maximum.accumulate((margins + reference) * np.sign(reference) <= 0)
    times = [flip_times(own, own, here, OBJECTIVE) for own, here in zip(FEATURES, reference, strict=True)]
    expected, earliest, latest = (np.stack(column) for column in zip(*times, strict=True))
    # the integrator's error moves a crossing a little, never by a thousandth
    too_early = flipped & (path.times[:, :, None] < earliest * (1 - 1e-3))
    too_late = ~flipped & (path.times[:, :, None] > latest * (1 + 1e-3))
    assert too_early.sum() == too_late.sum() == 0
    assert (earliest <= expected).all() and (expected <= latest).all()
    assert np.isfinite(latest).mean() > 0.1 and flipped.any((0,)).mean() > 0.1


def test_a_flip_early_in_training_is_when_it_is_expected():
    features = FEATURES[3]
    sure = features @ features.mean(0) > 0.5 * np.linalg.norm(features, axis=1) * np.linalg.norm(features.mean(0))
    rows = features[sure]
    moment = 0.002 / curvature_of(FEATURES[3:4])[0]
    margins = gradient_flow(features, np.ones(5), OBJECTIVE, times=np.array([0.0, moment]))[-1] @ rows.T
    assert len(rows)
    np.testing.assert_allclose(flip_times(features, rows, -margins, OBJECTIVE).expected, moment, rtol=5e-3)


def test_rows_that_move_away_are_not_expected_to_flip_and_rows_on_the_border_flip_at_once():
    features = np.array([[1.0, 0.0], [1.0, 1.0]])
    rows = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    expected, earliest, latest = flip_times(features, rows, np.array([-1.0, 0.0, 1.0]), OBJECTIVE)
    assert expected[0] == latest[0] == np.inf and np.isfinite(earliest[0])
    assert earliest[2] == expected[2] == latest[2] == np.inf


@pytest.mark.parametrize("alpha", [2.0, 1.0, 0.6])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_guarantees_hold_and_the_gaussian_value_is_met_by_gaussians(alpha, offset):
    # Δ lies along a coordinate, where the tail is exactly of index α
    behaviour = symmetric_behaviour(np.array([5.0, 0.0, 0.0]), alpha=alpha, offset=np.array([offset, 0.0, 0.0]))
    known = EarlyAccuracy(5.0, offset, 1.0, 1.0)
    sample, draws = behaviour.yes_no(200_000, 200_000, np.random.default_rng(7)), 400_000
    share = float((sample.features @ behaviour.difference > 0).mean())
    error = np.sqrt(share * (1 - share) / draws)
    norm = behaviour.plus.norm
    bound = known.subexponential(alphas=(alpha, alpha), norms=(norm, norm))
    assert known.guaranteed() <= share + 3 * error and bound <= share + 3 * error
    if alpha == 2.0:
        assert abs(known.gaussian() - share) <= 3 * error
        assert bound > 0.75


def test_guarantees_hold_on_the_sphere():
    behaviour = SyntheticBehaviour(
        VonMisesFisher(np.array([1.0, 0.0, 0.0, 0.0]), 4.0), VonMisesFisher(np.array([0.0, 1.0, 0.0, 0.0]), 4.0)
    )
    sample = behaviour.yes_no(100_000, 100_000, np.random.default_rng(8))
    found = EarlyAccuracy.of_classes(sample.states[sample.is_plus], sample.states[~sample.is_plus])
    gap = behaviour.difference / np.linalg.norm(behaviour.difference)
    assert found.spread_plus == pytest.approx(np.sqrt(gap @ behaviour.plus.covariance @ gap), rel=0.02)
    assert found.distance == pytest.approx(np.linalg.norm(behaviour.difference), rel=0.02)
    assert found.guaranteed() <= (sample.features @ gap > 0).mean()


def test_a_class_on_the_wrong_side_is_guaranteed_nothing_by_any_bound():
    accuracy = EarlyAccuracy(2.0, 5.0, 1.0, 1.0)
    assert accuracy.rooms == (6.0, -4.0)
    assert accuracy.subexponential(alphas=(2.0, 2.0), norms=(1.0, 1.0)) == pytest.approx(0.5)
