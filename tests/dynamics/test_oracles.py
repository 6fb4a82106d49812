"""One pair: the closed forms against the integrator, from any start and over many scales."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from foretune.dynamics.flow import gradient_flow
from foretune.dynamics.oracles import one_pair_dpo, one_pair_ipo, one_pair_slic
from foretune.objectives import DPO, IPO, SLiC

ORACLES = [(one_pair_dpo, DPO), (one_pair_ipo, IPO), (one_pair_slic, SLiC)]


@pytest.mark.parametrize(("oracle", "kind"), ORACLES)
@settings(max_examples=20)
@given(st.floats(-5, 5), st.floats(0.1, 2), st.floats(0.01, 10))
def test_they_solve_the_flow_of_one_pair(oracle, kind, start, beta, kernel):
    objective, times = kind(beta=beta), np.array([0.0, 0.1, 0.5, 2.0])
    solution = solve_ivp(
        lambda _, margin: -kernel * objective.slope(margin),
        (0.0, 2.0),
        [start],
        t_eval=times,
        method="DOP853",
        rtol=1e-9,
        atol=1e-10,
        max_step=0.01 if kind is SLiC else np.inf,
    )
    slack = 0.02 * beta * kernel if kind is SLiC else 1e-6  # the integrator steps over the kink
    found = oracle(times, np.array(kernel), objective, start=start)
    np.testing.assert_allclose(found, solution.y[0], rtol=1e-6, atol=slack)


@pytest.mark.parametrize(("oracle", "kind"), ORACLES)
def test_orthogonal_pairs_are_each_one_pair(oracle, kind):
    features, weights = np.diag([1.0, 2.0, 0.5]), np.array([1.0, 1.0, 2.0])
    objective, times = kind(beta=0.5), np.array([0.0, 0.5, 1.0, 3.0])
    path = gradient_flow(features, weights, objective, times=times) @ features.T
    kernels = np.sum(features**2, axis=1) * weights / weights.sum()
    np.testing.assert_allclose(oracle(times[:, None], kernels, objective), path, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", [-600.0, -30.0, 0.0, 30.0, 600.0])
def test_dpo_keeps_its_digits_at_extreme_margins(start):
    objective, moment = DPO(beta=1.0), 1e-3
    found = one_pair_dpo(np.array([0.0, moment]), np.array(1.0), objective, start=start)
    np.testing.assert_allclose(found[0], start, rtol=1e-12, atol=1e-12)
    assert found[1] - found[0] == pytest.approx(-objective.slope(np.array(start)) * moment, rel=1e-2, abs=1e-12)


def test_margins_add_up_over_two_stages():
    objective = DPO(beta=0.3)
    half = one_pair_dpo(np.array(2.0), np.array(1.5), objective)
    whole = one_pair_dpo(np.array(4.0), np.array(1.5), objective)
    assert one_pair_dpo(np.array(2.0), np.array(1.5), objective, start=half) == pytest.approx(float(whole), rel=1e-12)
