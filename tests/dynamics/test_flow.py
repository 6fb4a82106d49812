"""Gradient flow against exact solutions, tiny Euler steps and its own invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import wrightomega
from tests.reference.flow import reference_flow

from foretune.dynamics.flow import gradient_descent, gradient_flow
from foretune.objectives import DPO, IPO, SLiC

TIMES = np.array([0.0, 0.3, 1.0, 4.0, 20.0])


def problem(seed, count=6, dim=4):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, dim)) + 0.3, generator.uniform(0.3, 2, count)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([(5, 3), (3, 5)]), st.sampled_from([DPO(beta=0.7), IPO(beta=0.7)]))
def test_the_flow_equals_tiny_euler_steps(seed, shape, objective):
    features, weights = problem(seed, *shape)
    found = gradient_flow(features, weights, objective, times=np.array([0.0, 0.5]))[-1]
    coarse, fine = (reference_flow(features, weights, objective.slope, time=0.5, steps=steps) for steps in (100, 200))
    # Richardson: the error of Euler's method is proportional to its step
    np.testing.assert_allclose(found, 2 * fine - coarse, atol=2e-3 * (1 + np.abs(fine).max()))
    np.testing.assert_allclose(found, fine, atol=1.5 * np.abs(fine - coarse).max() + 1e-6)


@pytest.mark.parametrize("kappa", [0.2, 3.0])
def test_one_pair_of_dpo_follows_the_wright_omega_function(kappa):
    feature = np.array([[0.6, -0.8]]) * np.sqrt(kappa)
    found = gradient_flow(feature, np.ones(1), DPO(beta=1.0), times=TIMES) @ feature[0]
    constant = kappa * TIMES + 1.0
    np.testing.assert_allclose(found, constant - wrightomega(constant).real, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kappa", [0.2, 3.0])
def test_one_pair_of_ipo_decays_exponentially(kappa):
    feature, goal = np.array([[0.6, -0.8]]) * np.sqrt(kappa), 0.5 / 0.25
    found = gradient_flow(feature, np.ones(1), IPO(beta=0.25), times=TIMES) @ feature[0]
    np.testing.assert_allclose(found, goal - goal * np.exp(-2 * kappa * TIMES), rtol=1e-6, atol=1e-7)


def test_one_pair_of_the_hinge_grows_linearly_until_its_kink():
    feature = np.array([[0.6, -0.8]])
    found = gradient_flow(feature, np.ones(1), SLiC(beta=0.5), times=TIMES) @ feature[0]
    np.testing.assert_allclose(found, np.minimum(2.0, 0.5 * TIMES), rtol=1e-3)


@pytest.mark.parametrize("objective", [DPO(beta=0.5), IPO(beta=0.5)])
def test_small_steps_of_descent_approach_the_flow(objective):
    features, weights = problem(0)
    target = gradient_flow(features, weights, objective, times=np.array([0.0, 1.0]))[-1]
    errors = [
        np.abs(gradient_descent(features, weights, objective, learning_rate=1 / steps, steps=steps)[-1] - target).max()
        for steps in (100, 200, 400)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_descent_starts_at_zero_and_takes_the_gradient_step():
    features, weights = problem(1)
    objective = DPO(beta=0.5)
    path = gradient_descent(features, weights, objective, learning_rate=0.3, steps=2)
    assert path.shape == (3, 4) and not path[0].any()
    np.testing.assert_allclose(path[1], 0.3 * 0.25 * weights @ features / weights.sum())
    share = weights / weights.sum()
    np.testing.assert_allclose(path[2] - path[1], -0.3 * (share * objective.slope(features @ path[1])) @ features)


def test_fewer_rows_than_dimensions_give_the_same_flow():
    features, weights = problem(2, 4, 4)
    padded = np.concatenate([features, np.zeros((4, 7))], axis=1)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(11, 11)))[0]
    small = gradient_flow(features, weights, DPO(beta=0.5), times=TIMES)
    large = gradient_flow(padded @ turn, weights, DPO(beta=0.5), times=TIMES)
    np.testing.assert_allclose(large @ turn.T[:, :4], small, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(large @ turn.T[:, 4:], 0.0, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_row_order_and_the_scale_of_weights_do_not_matter(shape):
    features, weights = problem(4, *shape)
    order = np.random.default_rng(5).permutation(len(features))
    expected = gradient_flow(features, weights, DPO(beta=0.5), times=TIMES)
    for other in (
        gradient_flow(features[order], weights[order], DPO(beta=0.5), times=TIMES),
        gradient_flow(features, 3 * weights, DPO(beta=0.5), times=TIMES),
    ):
        np.testing.assert_allclose(other, expected, rtol=1e-5, atol=1e-6)


def test_a_row_of_weight_two_counts_as_two_rows_and_one_of_weight_zero_as_none():
    features, _ = problem(6)
    weighted = gradient_flow(features, np.array([2.0, 1, 1, 1, 1, 0]), DPO(beta=0.5), times=TIMES)
    repeated = gradient_flow(features[[0, 0, 1, 2, 3, 4]], np.ones(6), DPO(beta=0.5), times=TIMES)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5, atol=1e-6)


def test_the_loss_never_rises():
    features, weights = problem(7)
    for objective in (DPO(beta=0.5), IPO(beta=0.5), SLiC(beta=0.5)):
        margins = gradient_flow(features, weights, objective, times=np.linspace(0, 10, 30)) @ features.T
        losses = objective.value(margins) @ weights / weights.sum()
        assert (np.diff(losses) <= 1e-6).all()
        assert losses[-1] < losses[0]


def test_the_flow_stands_still_while_the_learning_rate_is_zero():
    # warm-up starts at a rate of 0, so the clock of the first step is that of the start
    features, weights = problem(8)
    times = np.array([0.0, 0.0, 0.5, 1.0, 1.0])
    found = gradient_flow(features, weights, DPO(beta=0.5), times=times)
    expected = gradient_flow(features, weights, DPO(beta=0.5), times=np.unique(times))
    np.testing.assert_array_equal(found, expected[[0, 0, 1, 2, 2]])
    assert not gradient_flow(features, weights, DPO(beta=0.5), times=np.zeros(2)).any()


def test_margins_that_a_kink_holds_are_followed():
    """Rows that pull against one another: the hinge holds some margins at its kink for good."""
    features = np.random.default_rng(3).normal(size=(6, 4))
    objective, times = SLiC(beta=2.0), np.linspace(0, 40, 5)
    found = gradient_flow(features, np.ones(6), objective, times=times)
    slow = gradient_descent(features, np.ones(6), objective, learning_rate=40 / 200_000, steps=200_000)[::50_000]
    np.testing.assert_allclose(found @ features.T, slow @ features.T, atol=0.03)
    assert np.abs(found[-1] @ features.T - 0.5).min() < 0.03
