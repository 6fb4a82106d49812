"""What every objective must satisfy, over a table of all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, relu

from foretune.dynamics.flow import gradient_flow
from foretune.objectives import DPO, IPO, SLiC

BETAS = (0.01, 0.1, 0.5, 2.0)
OBJECTIVES = [kind(beta=beta) for kind in (DPO, IPO, SLiC) for beta in BETAS]
SMOOTH = [objective for objective in OBJECTIVES if not isinstance(objective, SLiC)]
MARGINS = np.concatenate([np.linspace(-40, 40, 81), [-3.7, -0.01, 0.003, 7.3]])

every = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
smooth = pytest.mark.parametrize("objective", SMOOTH, ids=str)


def away_from_kinks(objective):
    if isinstance(objective, SLiC):
        return MARGINS[np.abs(objective.beta * MARGINS - 1) > 1e-6]
    return MARGINS


def derivative(function, margin):
    leaf = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope.numpy()


@every
def test_slope_is_the_derivative_of_the_value(objective):
    margin = away_from_kinks(objective)
    np.testing.assert_allclose(objective.slope(margin), derivative(objective.torch_value, margin), rtol=1e-10)


@every
def test_slope_at_the_kink_is_the_one_torch_takes(objective):
    margin = np.array([0.0, 1 / objective.beta])
    np.testing.assert_allclose(objective.slope(margin), derivative(objective.torch_value, margin), rtol=1e-10)


@smooth
def test_curvature_is_the_derivative_of_the_slope(objective):
    def slope(leaf):
        (found,) = torch.autograd.grad(objective.torch_value(leaf).sum(), leaf, create_graph=True)
        return found

    # autograd loses digits in 1 − σ, hence the absolute tolerance
    np.testing.assert_allclose(objective.curvature(MARGINS), derivative(slope, MARGINS), rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("beta", BETAS)
def test_hinge_has_no_curvature_between_finite_differences_of_its_slope(beta):
    objective = SLiC(beta=beta)
    margin = away_from_kinks(objective)
    differences = (objective.slope(margin + 1e-8) - objective.slope(margin)) / 1e-8
    np.testing.assert_array_equal(objective.curvature(margin), differences)


@every
def test_numpy_and_torch_values_agree(objective):
    told = objective.torch_value(torch.tensor(MARGINS)).numpy()
    np.testing.assert_allclose(objective.value(MARGINS), told, rtol=1e-12, atol=1e-300)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_margins_stay_finite(objective, dtype):
    margin = torch.tensor([-1e4, -80.0, 80.0, 1e4], dtype=dtype, requires_grad=True)
    value = objective.torch_value(margin)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    assert value.dtype == dtype
    assert value.isfinite().all() and slope.isfinite().all()
    # 8 bits of mantissa; IPO squares a difference of the same precision
    np.testing.assert_allclose(
        value.detach().double(), objective.value(margin.detach().double().numpy()), rtol=0.03, atol=1e-6
    )


@every
def test_numpy_is_finite_at_extreme_margins_without_a_warning(objective):
    margin = np.array([-1e4, -80.0, 80.0, 1e4])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        figures = [objective.value(margin), objective.slope(margin), objective.curvature(margin)]
    assert np.isfinite(figures).all()


@every
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_the_shape_of_the_margin_is_kept(objective, shape):
    margin = np.zeros(shape)
    for function in (objective.value, objective.slope, objective.curvature):
        assert np.shape(function(margin)) == shape


@every
@settings(deadline=None)
@given(left=st.floats(-200, 200), right=st.floats(-200, 200))
def test_values_are_convex_and_their_slope_does_not_fall(objective, left, right):
    low, high = sorted([left, right])
    assert objective.slope(np.array(low)) <= objective.slope(np.array(high)) + 1e-12
    middle = objective.value(np.array((low + high) / 2))
    ends = (objective.value(np.array(low)) + objective.value(np.array(high))) / 2
    assert middle <= ends * (1 + 1e-12) + 1e-12


@settings(deadline=None)
@given(margin=st.floats(-500, 500), beta=st.floats(1e-3, 10))
def test_swapping_chosen_and_rejected_changes_dpo_by_the_scaled_margin(margin, beta):
    objective = DPO(beta=beta)
    swapped = objective.value(np.array(margin)) - objective.value(np.array(-margin))
    np.testing.assert_allclose(swapped, -beta * margin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("beta", "other"), [(0.1, 0.5), (0.05, 2.0)])
def test_scaled_margins_of_dpo_depend_on_beta_squared_times_time(beta, other):
    generator = np.random.default_rng(0)
    features, weights = generator.normal(size=(6, 3)), generator.uniform(0.5, 2, 6)
    times = np.array([0.0, 1.0, 5.0, 30.0]) / beta**2
    path = gradient_flow(features, weights, DPO(beta=beta), times=times)
    again = gradient_flow(features, weights, DPO(beta=other), times=times * (beta / other) ** 2)
    margins = beta * path @ features.T
    assert np.abs(margins[-1]).max() > 1
    np.testing.assert_allclose(margins, other * again @ features.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [DPO, IPO, SLiC])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(kind, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        kind(beta=beta)


# trl 1.16, DPOTrainer._compute_loss, per sequence; delta is its delta_score (for ipo: after its per-token mean)
TRL = {
    DPO: lambda beta, delta: -logsigmoid(beta * delta),
    SLiC: lambda beta, delta: relu(1 - beta * delta),
    IPO: lambda beta, delta: (delta - 1 / (2 * beta)) ** 2,
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", TRL)
def test_losses_equal_those_of_trl(kind, beta):
    delta = torch.tensor(MARGINS)
    torch.testing.assert_close(kind(beta=beta).torch_value(delta), TRL[kind](beta, delta), rtol=1e-12, atol=0)
