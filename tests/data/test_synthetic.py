"""Synthetic behaviours have the moments, overlaps and tails that they state."""

import numpy as np
import pytest

from foretune.data.synthetic import (
    ExponentialPower,
    SyntheticBehaviour,
    VonMisesFisher,
    overlapping_differences,
    symmetric_behaviour,
)
from foretune.errors import UserError
from foretune.statistics.behaviours import yes_no_features

MIXING = np.array([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.4, 0.7]])
CENTRE = np.array([1.0, -2.0, 0.5])
UNIT = np.array([2.0, -1.0, 2.0]) / 3
KINDS = [ExponentialPower(CENTRE, MIXING, alpha) for alpha in (2.0, 1.0, 0.6)]
KINDS += [VonMisesFisher(UNIT, kappa) for kappa in (0.5, 5.0, 50.0)]
DRAWS = 200_000


@pytest.mark.parametrize("kind", KINDS, ids=["gaussian", "exponential", "heavy", "wide", "narrow", "point"])
def test_draws_have_the_mean_and_covariance_that_are_stated(kind):
    rows = kind.draw(DRAWS, np.random.default_rng(0))
    error = rows.std(0) / np.sqrt(DRAWS)
    assert (np.abs(rows.mean(0) - kind.mean) <= 4 * error).all()
    centred = rows - kind.mean
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / np.sqrt(DRAWS)
    assert (np.abs(products.mean(0) - kind.covariance) <= 4.5 * error).all()


@pytest.mark.parametrize("alpha", [2.0, 1.0, 0.6])
def test_tails_obey_the_bound_with_the_stated_norm_and_the_norm_is_the_orlicz_norm(alpha):
    kind = ExponentialPower(np.zeros(1), np.eye(1), alpha)
    values = np.abs(kind.draw(DRAWS, np.random.default_rng(1))[:, 0])
    levels = np.quantile(values, [0.5, 0.9, 0.99, 0.999, 0.9999])
    assert ((values[:, None] > levels).mean(0) <= 2 * np.exp(-((levels / kind.norm) ** alpha))).all()
    # E exp(|z/K|^α) = 2 at half the exponent's rate has a finite variance: (1 − c)^(−1/α) for c = (1 − 2^−α)/2
    half = np.exp((values / kind.norm) ** alpha / 2)
    expected = (1 - (1 - 2**-alpha) / 2) ** (-1 / alpha)
    assert abs(half.mean() - expected) <= 5 * half.std() / np.sqrt(DRAWS)


def test_states_on_the_sphere_have_length_one():
    rows = VonMisesFisher(UNIT, 3.0).draw(100, np.random.default_rng(2))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0)


def test_overlaps_are_those_asked_for():
    lengths = np.array([1.0, 2.0, 0.5])
    for overlap in (-0.5, 0.0, 0.9):
        found = overlapping_differences(lengths, overlap=overlap, dim=5)
        cosines = np.full((3, 3), overlap) + (1 - overlap) * np.eye(3)
        np.testing.assert_allclose(found @ found.T, np.outer(lengths, lengths) * cosines, atol=1e-12)


@pytest.mark.parametrize(("overlap", "dim"), [(-0.6, 5), (0.0, 2)])
def test_directions_that_do_not_exist_are_refused(overlap, dim):
    with pytest.raises(UserError, match="3 behaviours have|no 3 directions"):
        overlapping_differences([1.0, 1.0, 1.0], overlap=overlap, dim=dim)


def test_both_kinds_of_response_come_from_the_same_figures():
    behaviour = SyntheticBehaviour(ExponentialPower(CENTRE, MIXING), VonMisesFisher(UNIT, 4.0))
    np.testing.assert_allclose(behaviour.difference, CENTRE - behaviour.minus.mean)
    assert behaviour.trace == pytest.approx(np.trace(MIXING @ MIXING.T))
    assert behaviour.concentration == pytest.approx(np.linalg.eigvalsh(MIXING @ MIXING.T).max())
    sample = behaviour.yes_no(3, 5, np.random.default_rng(3))
    assert sample.is_plus.tolist() == [True] * 3 + [False] * 5
    np.testing.assert_allclose(np.linalg.norm(sample.states[3:], axis=1), 1.0)
    expected = yes_no_features(sample.states, np.where(sample.is_plus, 0, 1))
    np.testing.assert_allclose(sample.features, expected)
    pairs = behaviour.responses(4, np.random.default_rng(3))
    assert pairs.chosen.shape == pairs.rejected.shape == (4, 3)
    np.testing.assert_allclose(np.linalg.norm(pairs.rejected, axis=1), 1.0)


def test_a_symmetric_behaviour_has_its_difference_and_offset():
    behaviour = symmetric_behaviour(np.array([3.0, 4.0]), spread=2.0, alpha=1.0, offset=1.0)
    np.testing.assert_allclose(behaviour.plus.mean + behaviour.minus.mean, [2.0, 2.0])
    np.testing.assert_allclose(behaviour.difference, [3.0, 4.0])
