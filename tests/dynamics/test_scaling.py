"""The scaling with the number of behaviours against flows of many behaviours together."""

import numpy as np
import pytest
from tests.reference.many_problems import flow

from foretune.data.synthetic import overlapping_differences
from foretune.dynamics.flow import gradient_flow
from foretune.dynamics.scaling import (
    KernelExtremes,
    early_test_error,
    kernel_extremes,
    margin_bounds,
    pairs_needed,
)
from foretune.objectives import DPO

OBJECTIVE = DPO(beta=0.5)


def clusters(generator, *, behaviours, rows=3, dim=2, noise=0.3, leak=0.0):
    """Behaviours in subspaces of their own, apart from a leak, shape (behaviours · rows, behaviours · dim)."""
    features = leak * generator.normal(size=(behaviours * rows, behaviours * dim))
    for index in range(behaviours):
        own = generator.normal(size=dim) + noise * generator.normal(size=(rows, dim))
        features[index * rows : (index + 1) * rows, index * dim : (index + 1) * dim] += own
    return features, np.repeat(np.arange(behaviours), rows)


def test_orthogonal_behaviours_are_one_behaviour_slowed_down_by_their_number():
    features, _ = clusters(np.random.default_rng(0), behaviours=1)
    times = np.array([0.0, 1.0, 10.0])
    alone = gradient_flow(features, np.ones(3), OBJECTIVE, times=times, tolerance=1e-9) @ features.T
    for count in (2, 5):
        many = np.kron(np.eye(count), features)
        path = gradient_flow(many, np.ones(len(many)), OBJECTIVE, times=count * times, tolerance=1e-9) @ many.T
        np.testing.assert_allclose(path, np.tile(alone, count), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("leak", [0.0, 0.003])
def test_no_pair_leaves_its_bounds_in_10000_problems(leak):
    generator, tried = np.random.default_rng(1), 0
    for behaviours in (1, 2, 4):
        problems = [clusters(generator, behaviours=behaviours, leak=leak) for _ in range(12_000)]
        found = [kernel_extremes(*problem) for problem in problems]
        fit = [index for index, one in enumerate(found) if one.holds]
        features = np.stack([problems[index][0] for index in fit])
        extremes = KernelExtremes(*np.array([found[index].value for index in fit]).T)
        ends = margin_bounds(np.array(0.0), extremes, behaviours, beta=OBJECTIVE.beta).until
        path = flow(features, OBJECTIVE.slope, ends=ends, steps=25)
        scaled = OBJECTIVE.beta * np.einsum("pnd,tpd->tpn", features, path.weights)
        bounds = margin_bounds(path.times, extremes, behaviours, beta=OBJECTIVE.beta)
        assert (scaled < bounds.lower[:, :, None] - 1e-6).sum() == 0
        assert (scaled > bounds.upper[:, :, None] + 1e-6).sum() == 0
        assert scaled.max() <= np.log(3) + 1e-6
        tried += len(fit)
    assert tried >= 10_000


def test_hypotheses_that_fail_are_named():
    features, owner = clusters(np.random.default_rng(2), behaviours=2, noise=0.0)
    assert kernel_extremes(features, owner).holds
    assert "differ in size" in kernel_extremes(features[1:], owner[1:]).failed[0]
    assert "pull apart" in kernel_extremes(np.array([[1.0], [-1.0]]), np.zeros(2)).failed[0]
    found = kernel_extremes(np.ones((2, 2)), np.arange(2))
    assert "not orthogonal enough" in found.failed[0] and found.value == KernelExtremes(2.0, 2.0, 2.0)


@pytest.mark.parametrize("pairs", [40, np.inf])
@pytest.mark.parametrize("behaviours", [1, 4, 16])
def test_the_early_test_error_is_that_of_drawn_pairs(behaviours, pairs):
    dim, signal, draws = 400, 3.0, 200
    means = overlapping_differences([signal] * behaviours, overlap=0.0, dim=dim)
    generator = np.random.default_rng(3)
    errors = []
    for _ in range(draws):
        weights = means.mean(0)
        if np.isfinite(pairs):
            weights = weights + generator.normal(size=dim) / np.sqrt(pairs * behaviours)
        unseen = means[generator.integers(behaviours, size=100)] + generator.normal(size=(100, dim))
        errors.append((unseen @ weights < 0).mean())
    expected = early_test_error(np.array(behaviours), signal=signal, spread=1.0, dim=dim, pairs=pairs)
    # beside the Monte-Carlo error the norm of the noise, 1/√(2d) of itself, and its part along ψ
    assert abs(np.mean(errors) - expected) <= 3 * np.std(errors) / np.sqrt(draws) + 0.01 * np.isfinite(pairs)


def test_the_pairs_needed_are_enough_for_all_means():
    behaviours, dim, signal, accuracy, draws = 20, 30, 2.0, 0.6, 4000
    kind = {"signal": signal, "trace": float(dim), "concentration": 1.0, "accuracy": accuracy}
    pairs = np.ceil(pairs_needed(np.array(behaviours), **kind))
    noise = np.random.default_rng(4).normal(size=(draws, behaviours, dim)) / np.sqrt(pairs)
    good = (np.linalg.norm(noise, axis=2) <= accuracy * signal).all(1).mean()
    assert good >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / draws)
    growth = pairs_needed(np.array([10.0**4, 10.0**8, 10.0**12]), **kind | {"trace": 1e-6, "failure": 1.0})
    np.testing.assert_allclose(growth / growth[0], [1, 2, 3], rtol=1e-3)
