"""Tail index and norm against distributions whose tails are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import gennorm

from foretune.data.synthetic import ExponentialPower, VonMisesFisher
from foretune.statistics.tails import tail_along, tail_index

DRAWS = 300


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.0])
def test_the_intervals_cover_the_truth_in_19_of_20_samples(alpha):
    kind = ExponentialPower(np.zeros(1), np.eye(1), alpha)
    generator = np.random.default_rng(0)
    found = [tail_index(kind.draw(600, generator)[:, 0]).value for _ in range(DRAWS)]
    error = np.sqrt(0.05 * 0.95 / DRAWS)
    for covered in (
        np.mean([one.alpha_low <= alpha <= one.alpha_high for one in found]),
        np.mean([one.norm_low <= kind.norm <= one.norm_high for one in found]),
    ):
        assert abs(covered - 0.95) <= 3 * error, covered
    assert np.median([one.alpha for one in found]) == pytest.approx(alpha, rel=0.03)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.0])
def test_the_estimate_is_the_maximum_of_the_likelihood(alpha):
    values = gennorm.rvs(alpha, size=400, random_state=1)
    centred = values - np.median(values)
    best = minimize(
        lambda logs: -gennorm.logpdf(centred, np.exp(logs[0]), scale=np.exp(logs[1])).sum(), [0.0, 0.0], tol=1e-9
    )
    index, scale = np.exp(best.x)
    found = tail_index(values).value
    assert found.alpha == pytest.approx(index, rel=0.005)
    assert found.norm == pytest.approx(scale * (1 - 2**-index) ** (-1 / index), rel=0.005)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
def test_the_norm_is_the_orlicz_norm(alpha):
    scale, norm = gennorm.std(alpha), ExponentialPower(np.zeros(1), np.eye(1), alpha).norm
    end = (40 * 2**alpha) ** (1 / alpha)  # beyond it the integrand is below e^−40
    mean = quad(lambda z: 2 * np.exp(gennorm.logpdf(z, alpha) + (z / (scale * norm)) ** alpha), 0, end, limit=200)[0]
    assert mean == pytest.approx(2.0, rel=1e-6)


@settings(max_examples=25)
@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_shift_and_scale_act_as_they_should(scale, shift):
    values = np.random.default_rng(2).normal(size=300)
    plain, found = tail_index(values).value, tail_index(scale * (values + shift)).value
    np.testing.assert_allclose(found[:3], plain[:3], rtol=1e-2)
    np.testing.assert_allclose(found[3:], scale * np.array(plain[3:]), rtol=1e-2)


def test_what_the_family_does_not_describe_is_named():
    generator = np.random.default_rng(3)
    skewed = tail_index(generator.exponential(size=2000))
    assert any("not exponential-power" in words for words in skewed.failed)
    few = tail_index(generator.normal(size=30))
    assert any("more than 30 values" in words for words in few.failed)
    constant = tail_index(np.ones(100))
    assert constant.failed == ("the values have no spread",) and np.isnan(constant.value.alpha)


def test_fits_are_refused_no_more_often_than_their_level():
    generator, tried = np.random.default_rng(4), 200
    refused = sum(not tail_index(generator.laplace(size=300)).holds for _ in range(tried))
    assert refused / tried <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / tried)


def test_rows_are_judged_along_the_direction():
    mixing = np.diag([1.0, 3.0])
    rows = ExponentialPower(np.array([5.0, -1.0]), mixing, alpha=1.0).draw(4000, np.random.default_rng(5))
    found = tail_along(rows, np.array([0.0, 7.0])).value
    truth = 3 * ExponentialPower(np.zeros(1), np.eye(1), alpha=1.0).norm
    assert found.norm_low < truth < found.norm_high
    sphere = VonMisesFisher(np.eye(8)[0], 30.0)
    across = tail_along(sphere.draw(4000, np.random.default_rng(6)), np.eye(8)[1])
    assert across.holds and across.value.alpha_low < 2.1 < across.value.alpha_high + 0.2
