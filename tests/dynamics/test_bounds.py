"""The bounds hold in every one of many random problems, and are not far from what happens."""

import numpy as np
import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.reference.many_problems import descend, flow, largest_eigenvalues, mean_gradient, random_problems

from foretune.data.synthetic import symmetric_behaviour
from foretune.dynamics.bounds import (
    gaussian_sampling_term,
    largest_curvature,
    linear_deviation,
    loss_drop_bound,
    loss_drop_floor,
    objective_failures,
    sampling_term,
    step_failures,
    weight_change_bound,
)
from foretune.dynamics.closed_form import slope_at_start
from foretune.dynamics.flow import gradient_descent
from foretune.objectives import DPO, IPO, SLiC

PROBLEMS = 12_000
FEATURES = random_problems(0, problems=PROBLEMS, rows=6, dim=4)
OBJECTIVES = [DPO(beta=0.3), IPO(beta=0.8)]


def curvatures(features, objective):
    return largest_eigenvalues(features) * float(objective.curvature(np.array(0.0)))


def violations(features, objective, path, *, floor):
    """Shares of the bounds' own size by which they are broken at worst, one number a problem; ≤ 0 where they hold."""
    norms, curvature = np.linalg.norm(features.mean(1), axis=1), curvatures(features, objective)
    length = np.linalg.norm(path.weights, axis=2)
    margins = np.einsum("pnd,tpd->tpn", features, path.weights)
    drop = float(objective.value(np.array(0.0))) - objective.value(margins).mean(2)
    change, most = (bound(path.times, norms, objective) for bound in (weight_change_bound, loss_drop_bound))
    linear = -slope_at_start(objective) * path.times[:, :, None] * features.mean(1)
    away = np.linalg.norm(path.weights - linear, axis=2) - curvature / 2 * path.times * change
    broken = [(length - change) / change[-1], (drop - most) / most[-1], away / change[-1]]
    if floor:
        broken.append((loss_drop_floor(path.times, norms, curvature, objective) - drop) / most[-1])
    return np.max(broken, axis=(0, 1))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("size", [0.2, 1.0, 2.0])
def test_no_problem_of_descent_breaks_a_bound(objective, size):
    # exact statements about descent: nothing but rounding may break them
    path = descend(FEATURES, objective.slope, rates=size / curvatures(FEATURES, objective), steps=40)
    assert (violations(FEATURES, objective, path, floor=size <= 1) > 1e-12).sum() == 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_no_problem_of_flow_breaks_a_bound(objective):
    path = flow(FEATURES, objective.slope, ends=20 / curvatures(FEATURES, objective), steps=80)
    assert (violations(FEATURES, objective, path, floor=True) > 1e-6).sum() == 0


def test_the_search_would_find_a_bound_that_is_a_little_too_tight():
    objective = DPO(beta=0.3)
    path = descend(FEATURES, objective.slope, rates=0.2 / curvatures(FEATURES, objective), steps=40)
    norms, curvature = np.linalg.norm(FEATURES.mean(1), axis=1), curvatures(FEATURES, objective)
    length = np.linalg.norm(path.weights, axis=2)
    assert (length > 0.99 * weight_change_bound(path.times, norms, objective)).any()
    margins = np.einsum("pnd,tpd->tpn", FEATURES, path.weights)
    drop = np.log(2) - objective.value(margins).mean(2)
    early, most = slice(1, 5), loss_drop_bound(path.times, norms, objective)
    assert (drop[early] > 0.98 * most[early]).any()
    assert (drop[early] < 1.05 * loss_drop_floor(path.times, norms, curvature, objective)[early]).any()


def test_steps_beyond_the_limit_can_break_them():
    objective = DPO(beta=0.3)
    path = descend(FEATURES, objective.slope, rates=6 / curvatures(FEATURES, objective), steps=40)
    assert (violations(FEATURES, objective, path, floor=False) > 1e-3).any()


@settings(max_examples=300)
@given(
    arrays(float, (4, 3), elements=st.floats(-100, 100, width=32)),
    st.floats(0.01, 10),
    st.floats(0.05, 1),
)
def test_hypothesis_finds_no_counter_example(features, beta, size):
    objective, many = DPO(beta=beta), features[None].astype(float)
    curvature = curvatures(many, objective)
    if curvature[0] < 1e-6 or np.linalg.norm(many.mean(1)) < 1e-6 * np.abs(many).max():
        return
    path = descend(many, objective.slope, rates=size / curvature, steps=30)
    worst = violations(many, objective, path, floor=True)[0]
    target(float(worst))
    assert worst <= 1e-9


def test_one_problem_has_the_figures_of_the_many():
    objective, features = DPO(beta=0.3), FEATURES[7]
    curvature = curvatures(FEATURES, objective)[7]
    assert largest_curvature(features, objective) == pytest.approx(curvature)
    assert linear_deviation(np.array(3.0), features, objective) == pytest.approx(1.5 * curvature)
    path = descend(FEATURES[:8], objective.slope, rates=np.full(8, 0.5), steps=5).weights[:, 7]
    expected = gradient_descent(features, np.ones(6), objective, learning_rate=0.5, steps=5)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-12)
    first = mean_gradient(FEATURES[7:8], np.zeros((1, 4)), objective.slope)[0]
    np.testing.assert_allclose(first, slope_at_start(objective) * features.mean(0))


def shares_within(term, alpha, draws=4000):
    """The share of samples whose mean is within `term` of the truth, and its Monte-Carlo error."""
    behaviour = symmetric_behaviour(np.array([2.0, 0.0, 0.0, 0.0]), spread=1.0, alpha=alpha)
    generator = np.random.default_rng(1)
    plus, minus = (side.draw(draws * 25, generator).reshape(draws, 25, 4) for side in (behaviour.plus, behaviour.minus))
    means = np.sqrt(2) * (plus.mean(1) - minus.mean(1)) / 2
    inside = np.linalg.norm(means - np.sqrt(2) * behaviour.difference / 2, axis=1) <= term
    off = np.abs(np.linalg.norm(means, axis=1) - np.linalg.norm(behaviour.difference) / np.sqrt(2)) <= term
    return inside.mean(), off.mean(), np.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize("alpha", [2.0, 1.0, 0.5])
def test_sampling_terms_hold_in_19_of_20_samples(alpha):
    # φ = √2 s x within answers: covariance 2·I in 4 dimensions, 50 rows
    inside, off, error = shares_within(sampling_term(8.0, 50), alpha)
    assert min(inside, off) >= 0.95 - 3 * error


def test_the_gaussian_sampling_term_holds_and_is_the_smaller():
    term = gaussian_sampling_term(8.0, 2.0, 50)
    assert term < sampling_term(8.0, 50)
    inside, off, error = shares_within(term, 2.0)
    assert min(inside, off) >= 0.95 - 3 * error
    assert shares_within(0.6 * term, 2.0)[0] < 0.95


def test_losses_and_steps_outside_the_hypotheses_are_named():
    assert objective_failures(IPO(beta=0.01)) == objective_failures(DPO(beta=100.0)) == ()
    assert objective_failures(SLiC(beta=0.3)) == ("the loss has its largest curvature elsewhere than at margin 0",)

    class Sigmoid(DPO):
        def slope(self, margin):
            from scipy.special import expit

            return -self.beta * expit(self.beta * margin) * expit(-self.beta * margin)

    assert "the loss is not convex" in objective_failures(Sigmoid(beta=0.5))
    assert step_failures(1.99, 1.0) == () and step_failures(1.0, 0.0) == ()
    assert step_failures(2.01, 1.0)[0].startswith("the step is too large")
