"""The closed forms against the flow that they describe."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import solve_ivp

from foretune.dynamics.accuracy import EarlyAccuracy
from foretune.dynamics.bounds import linear_deviation, loss_drop_bound, weight_change_bound
from foretune.dynamics.closed_form import (
    adam_first_step,
    chosen_log_prob_change,
    expected_noisy_square,
    initial_loss_rate,
    initial_margin_rate,
    label_noise_rates,
    label_smoothing_rates,
    second_order_weights,
    slope_at_start,
    speed_ratio,
)
from foretune.dynamics.flow import gradient_descent, gradient_flow
from foretune.objectives import DPO, IPO, DiscoPOP, SLiC

OBJECTIVES = [DPO(beta=0.1), DPO(beta=1.0), IPO(beta=0.5), SLiC(beta=0.2)]


def problem(seed, count=8, dim=5, scale=1.0, drift=0.3):
    return (np.random.default_rng(seed).normal(size=(count, dim)) + drift) * scale


def flow(features, objective, times):
    return gradient_flow(features, np.ones(len(features)), objective, times=times, tolerance=1e-10)


@pytest.mark.parametrize("objective", [DPO(beta=0.5), DiscoPOP(beta=0.1)], ids=str)
def test_second_order_is_the_flow_of_the_expansion_whichever_way_the_loss_bends(objective):
    features, times = problem(3), np.array([0.0, 5.0, 20.0, 60.0])
    slope, bend = (float(part(np.array(0.0))) for part in (objective.slope, objective.curvature))
    path = solve_ivp(
        lambda _, weights: -features.T @ (slope + bend * (features @ weights)) / len(features),
        (0.0, times[-1]),
        np.zeros(features.shape[1]),
        t_eval=times,
        rtol=1e-10,
        atol=1e-12,
    )
    np.testing.assert_allclose(second_order_weights(times, features, objective), path.y.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_initial_rates_are_the_derivatives_of_the_flow(objective):
    features = problem(0)
    norm = np.linalg.norm(features.mean(0))
    small = 1e-5 / max(1.0, objective.beta * abs(slope_at_start(objective)))
    margins = flow(features, objective, np.array([0.0, small])) @ features.T
    loss_rate, margin_rate = (np.diff(figure.mean(1))[0] / small for figure in (objective.value(margins), margins))
    assert loss_rate == pytest.approx(initial_loss_rate(norm, objective), rel=1e-4)
    assert margin_rate == pytest.approx(initial_margin_rate(norm, objective), rel=1e-4)


def test_the_papers_constants_for_balanced_yes_no_answers():
    generator = np.random.default_rng(1)
    states, sign = generator.normal(size=(20, 3)) + np.repeat([[1.0], [0.0]], 10, 0), np.repeat([1.0, -1.0], 10)
    distance = np.linalg.norm(states[:10].mean(0) - states[10:].mean(0))
    # φ = s (e_Yes − e_No) ⊗ x
    features = np.concatenate([sign[:, None] * states, -sign[:, None] * states], 1)
    norm, objective = np.linalg.norm(features.mean(0)), DPO(beta=0.3)
    assert initial_margin_rate(norm, objective) == pytest.approx(0.3 * distance**2 / 4)
    assert initial_loss_rate(norm, objective) == pytest.approx(-(0.3**2) * distance**2 / 8)
    assert weight_change_bound(2.0, norm, objective) == pytest.approx(2.0 * 0.3 * distance / (2 * np.sqrt(2)))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 10), st.integers(1, 6), st.floats(0.1, 4), st.floats(0.05, 2))
def test_the_bounds_are_never_violated(seed, count, dim, scale, beta):
    features, objective = problem(seed, count, dim, scale), DPO(beta=beta)
    times = np.array([0.0, 0.01, 0.1, 1.0, 10.0, 100.0]) / beta**2
    path = flow(features, objective, times)
    drive = features.mean(0)
    norm = np.linalg.norm(drive)
    linear = -slope_at_start(objective) * times[:, None] * drive
    length = np.linalg.norm(linear, axis=1)
    slack = 1e-6 * (1 + length)
    assert (np.linalg.norm(path, axis=1) <= weight_change_bound(times, norm, objective) + slack).all()
    drop = np.log(2) - objective.value(path @ features.T).mean(1)
    assert (drop <= loss_drop_bound(times, norm, objective) + 1e-6).all()
    deviation = np.linalg.norm(path - linear, axis=1)
    assert (deviation <= linear_deviation(times, features, objective) * length + slack).all()


def test_the_bounds_are_tight_at_first_and_hold_for_descent_with_a_moderate_step():
    features, objective = problem(2), DPO(beta=0.5)
    norm = np.linalg.norm(features.mean(0))
    early = np.array([0.0, 1e-3])
    path = flow(features, objective, early)
    assert np.linalg.norm(path[1]) == pytest.approx(weight_change_bound(early, norm, objective)[1], rel=1e-3)
    largest = np.linalg.norm(features, 2) ** 2 / len(features)
    rate = 2 / (objective.curvature(np.array(0.0)) * largest)
    path = gradient_descent(features, np.ones(8), objective, learning_rate=rate, steps=50)
    times = rate * np.arange(51)
    assert (np.linalg.norm(path, axis=1) <= weight_change_bound(times, norm, objective) + 1e-12).all()
    drop = np.log(2) - objective.value(path @ features.T).mean(1)
    assert (drop <= loss_drop_bound(times, norm, objective) + 1e-12).all()


@pytest.mark.parametrize(("count", "dim"), [(8, 3), (3, 8), (4, 4), (1, 5)])
def test_the_second_order_predictor_is_exact_for_ipo(count, dim):
    features, objective = problem(3, count, dim), IPO(beta=0.4)
    times = np.array([0.0, 0.05, 0.3, 2.0])
    expected = flow(features, objective, times)
    np.testing.assert_allclose(second_order_weights(times, features, objective), expected, rtol=1e-6, atol=1e-7)


def test_the_second_order_predictor_is_exact_where_features_are_linearly_dependent():
    features, objective = np.repeat(problem(4, 2, 5), 3, axis=0), IPO(beta=0.4)
    times = np.array([0.0, 0.1, 1.0])
    expected = flow(features, objective, times)
    np.testing.assert_allclose(second_order_weights(times, features, objective), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_second_order_is_closer_to_dpo_than_first_order(seed):
    features, objective = problem(seed, 12, 4), DPO(beta=0.5)
    times = np.array([0.0, 2.0, 5.0])
    truth = flow(features, objective, times)
    first_order = -slope_at_start(objective) * times[:, None] * features.mean(0)
    second_order = second_order_weights(times, features, objective)
    errors = [np.linalg.norm(path - truth, axis=1)[1:] for path in (second_order, first_order)]
    assert (errors[0] < errors[1]).all()


def test_a_hinge_has_the_linear_predictor():
    features, objective = problem(5), SLiC(beta=0.2)
    found = second_order_weights(np.array([0.0, 1.0, 3.0]), features, objective)
    np.testing.assert_allclose(found, 0.2 * np.array([[0.0], [1.0], [3.0]]) * features.mean(0), rtol=1e-12)


def early_shares(plus, minus, gap):
    return ((plus @ gap > 0).mean() + (minus @ gap < 0).mean()) / 2


def test_early_accuracy_of_gaussian_classes():
    generator = np.random.default_rng(6)
    centre_plus, centre_minus = np.array([1.2, 0.5, 0.0]), np.array([-0.3, 0.4, 0.2])
    spread_plus, spread_minus = np.array([1.0, 0.5, 2.0]), np.array([0.6, 1.5, 1.0])
    plus = centre_plus + spread_plus * generator.normal(size=(200_000, 3))
    minus = centre_minus + spread_minus * generator.normal(size=(200_000, 3))
    gap = centre_plus - centre_minus
    along = gap / np.linalg.norm(gap)
    known = EarlyAccuracy(
        float(np.linalg.norm(gap)),
        float((centre_plus @ centre_plus - centre_minus @ centre_minus) / (2 * np.linalg.norm(gap))),
        float(np.linalg.norm(spread_plus * along)),
        float(np.linalg.norm(spread_minus * along)),
    )
    share = early_shares(plus, minus, gap)
    assert known.gaussian() == pytest.approx(share, abs=0.004)
    assert known.guaranteed() <= share
    fitted = EarlyAccuracy.of_classes(plus, minus)
    np.testing.assert_allclose(
        [fitted.distance, fitted.offset, fitted.spread_plus, fitted.spread_minus],
        [known.distance, known.offset, known.spread_plus, known.spread_minus],
        rtol=0.02,
        atol=0.01,
    )


def test_early_accuracy_is_that_of_the_first_step_of_training():
    generator = np.random.default_rng(7)
    plus, minus = generator.normal(size=(400, 6)) + 0.4, generator.normal(size=(400, 6)) - 0.2
    features = np.sqrt(2) * np.concatenate([plus, -minus])
    path = gradient_descent(features, np.ones(800), DPO(beta=0.1), learning_rate=1e-3, steps=1)
    found = EarlyAccuracy.of_classes(plus, minus).gaussian()
    assert found == pytest.approx((path[1] @ features.T > 0).mean(), abs=0.03)


CLASS = arrays(float, (6, 2), elements=st.integers(-4, 4).map(float))


@given(CLASS, CLASS)
def test_the_guaranteed_accuracy_holds_for_any_distribution(plus, minus):
    gap = plus.mean(0) - minus.mean(0)
    assume(np.linalg.norm(gap) > 1e-9)
    found = EarlyAccuracy.of_classes(plus, minus)
    # a class without spread and exactly on the boundary is decided by rounding
    assume(min(found.spread_plus, found.spread_minus) > 1e-6)
    assert 0 <= found.guaranteed() <= early_shares(plus, minus, gap) + 1e-9


def test_nothing_is_guaranteed_to_a_class_on_the_wrong_side():
    assert EarlyAccuracy(2.0, 5.0, 1.0, 1.0).guaranteed() == pytest.approx(36 / 37 / 2)


def test_flipped_labels_have_the_identical_loss_curve_where_features_are_frozen():
    features, objective, times = problem(9), DPO(beta=0.5), np.array([0.0, 1.0, 10.0])
    margins, flipped = flow(features, objective, times) @ features.T, flow(-features, objective, times) @ -features.T
    np.testing.assert_allclose(flipped, margins, atol=1e-9)
    assert speed_ratio(1.7, 1.7) == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_rate_is_that_ratio_from_two_starts(objective):
    base, aligned = problem(10, drift=0.2), problem(11, drift=1.0)
    lengths = [np.linalg.norm(features.mean(0)) for features in (aligned, base)]
    rates = [initial_loss_rate(length, objective) for length in lengths]
    assert speed_ratio(*lengths) == pytest.approx(rates[0] / rates[1])


@pytest.mark.parametrize("flipped", [0.05, 0.2, 0.5])
def test_label_noise_scales_the_initial_rates(flipped):
    features, draws = problem(12, count=300, drift=1.0), 4000
    signs = np.where(np.random.default_rng(13).random((draws, 300)) < flipped, -1.0, 1.0)
    noisy = signs @ features / 300
    squares, clean = np.sum(noisy**2, axis=1), features.mean(0)
    error = squares.std() / np.sqrt(draws)
    assert abs(squares.mean() - expected_noisy_square(features, flipped)) <= 3 * error
    rates = label_noise_rates(flipped)
    # what is left over is the noise of 300 labels, the second term of `expected_noisy_square`
    left = expected_noisy_square(features, flipped) - rates.training_loss * clean @ clean
    assert 0 < left < 0.02 * clean @ clean
    along = noisy @ clean / (clean @ clean)
    assert abs(along.mean() - rates.clean_margin) <= 3 * along.std() / np.sqrt(draws)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_smoothed_losses_have_the_smoothed_rates(objective):
    smoothing, small = 0.15, 1e-6
    smoothed, robust = (
        lambda m: (1 - smoothing) * objective.value(m) + smoothing * objective.value(-m),
        lambda m: ((1 - smoothing) * objective.value(m) - smoothing * objective.value(-m)) / (1 - 2 * smoothing),
    )
    slopes = [(loss(np.array(small)) - loss(np.array(-small))) / (2 * small) for loss in (smoothed, robust)]
    rates, plain = label_smoothing_rates(smoothing), slope_at_start(objective)
    np.testing.assert_allclose(np.square(slopes[0]), rates.training_loss * plain**2, rtol=1e-6)
    np.testing.assert_allclose(slopes, [rates.clean_margin * plain, plain / rates.clean_margin], rtol=1e-6)


@given(arrays(float, (5, 3), elements=st.floats(-5, 5)), arrays(float, 3, elements=st.floats(-20, 20)))
def test_no_chosen_answer_loses_probability_while_its_margin_grows(head, move):
    state = np.array([0.5, -1.0, 0.7])
    changed = head + np.outer([1.0, -1.0, 0, 0, 0], move)
    before, after = (weights @ state - np.logaddexp.reduce(weights @ state) for weights in (head, changed))
    margin, odds = 2 * move @ state, np.exp(before)
    found = chosen_log_prob_change(np.array(margin), odds[0], odds[1])
    assert found == pytest.approx(after[0] - before[0], rel=1e-6, abs=1e-9)
    assert abs(margin) < 1e-6 or np.sign(found) == np.sign(margin) or abs(found) < 1e-9


def test_adams_first_step_is_that_of_torch():
    states, sign = problem(14, count=20, dim=6), np.where(np.arange(20) % 2, 1.0, -1.0)
    mean = (sign[:, None] * states).mean(0)
    feature = np.stack([mean, -mean])  # of the rows of Yes and No
    for scale in (1.0, 100.0):
        weight = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.01)
        margins = torch.tensor(scale * sign[:, None] * states) @ (weight[0] - weight[1])
        DPO(beta=0.1).torch_value(margins).mean().backward()
        optimizer.step()
        found = adam_first_step(scale * feature, DPO(beta=0.1), learning_rate=0.01)
        assert found.weight_change == pytest.approx(float(weight.detach().norm()), rel=1e-6)
        change = (torch.tensor(scale * sign[:, None] * states) @ (weight[0] - weight[1])).mean()
        assert found.margin_change == pytest.approx(float(change.detach()), rel=1e-6)
        assert found.margin_change == pytest.approx(2 * 0.01 * scale * np.abs(mean).sum(), rel=1e-4)
        assert found.weight_change == pytest.approx(0.01 * np.sqrt(12), rel=1e-4)


def test_adam_leaves_coordinates_without_a_gradient_alone():
    found = adam_first_step(np.array([0.0, 2.0]), DPO(beta=0.1), learning_rate=0.5, epsilon=0.0)
    assert found == (0.5, 1.0)
