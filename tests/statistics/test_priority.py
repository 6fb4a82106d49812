"""Priority levels, initial rates and the mixture that starts all behaviours equally fast."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference.unembedding import reference_margin, reference_unembedding_gradient

from foretune.objectives import DPO, IPO
from foretune.statistics.priority import (
    BehaviourKernel,
    behaviour_kernel,
    differences_kernel,
    equal_rate_failures,
    equal_rate_mixture,
    initial_rates,
    priority_gaps,
    priority_levels,
)

NAMES = ["a", "b", "c"]


def random_kernel(seed, dim=5):
    generator = np.random.default_rng(seed)
    means, shares = generator.normal(size=(3, dim)), generator.uniform(0.1, 1, 3)
    return BehaviourKernel(NAMES, means @ means.T, shares / shares.sum()), means


def test_hand_values():
    kernel = BehaviourKernel(["a", "b"], np.array([[4.0, -1.0], [-1.0, 1.0]]), np.array([0.25, 0.75]))
    np.testing.assert_allclose(initial_rates(kernel), [0.25, 0.5])
    length = np.sqrt(0.25 * 0.25 + 0.75 * 0.5)
    np.testing.assert_allclose(priority_levels(kernel), np.array([0.25, 0.5]) / length)
    np.testing.assert_allclose(equal_rate_mixture(kernel), [2 / 7, 5 / 7])


@given(st.integers(0, 1000))
def test_equal_shares_give_the_papers_priority_level(seed):
    kernel, means = random_kernel(seed)
    average = means.mean(0)
    found = priority_levels(kernel._replace(weights=np.full(3, 1 / 3)))
    np.testing.assert_allclose(found, means @ average / np.linalg.norm(average), rtol=1e-9)


def test_behaviours_that_cancel_have_no_priority():
    kernel = BehaviourKernel(["a", "b"], np.array([[1.0, -1.0], [-1.0, 1.0]]), np.array([0.5, 0.5]))
    assert not priority_levels(kernel).any()


def test_the_kernel_is_that_of_weighted_means():
    features = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    kernel = behaviour_kernel(
        features, np.array(["a", "a", "b", "c"]), np.array([3.0, 1.0, 1.0, 0.0]), behaviours=NAMES
    )
    np.testing.assert_allclose(kernel.matrix, [[2.25, 0, 0], [0, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(kernel.weights, [0.8, 0.2, 0.0])


@pytest.mark.parametrize("objective", [DPO(beta=0.3), IPO(beta=0.3)])
def test_initial_rates_are_those_of_the_losses_under_gradient_flow(objective):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    behaviour_of = np.array(["a", "b", "c", "a", "b", "c", "a", "b"])
    row_weights = np.array([1.0, 2.0, 0.5, 1.5, 1.0, 1.0, 0.2, 3.0])
    pairs = []
    for index in range(8):
        state = torch.randn(1, 4, generator=generator, dtype=torch.float64)
        pairs.append((state, [index % 7], state, [(3 * index + 1) % 7]))
    features = np.stack([reference_unembedding_gradient(weight, pair).ravel().numpy() for pair in pairs])
    kernel = behaviour_kernel(features, behaviour_of, row_weights, behaviours=NAMES)

    def gradient(members):
        leaf = weight.clone().requires_grad_()
        start = [reference_margin(weight, pair) for pair in pairs]
        losses = [row_weights[i] * objective.torch_value(reference_margin(leaf, pairs[i]) - start[i]) for i in members]
        return torch.autograd.grad(sum(losses) / row_weights[members].sum(), leaf)[0]

    whole = gradient(np.arange(8))
    rates = [float(-(gradient(np.flatnonzero(behaviour_of == name)) * whole).sum()) for name in NAMES]
    expected = -(float(objective.slope(np.array(0.0))) ** 2) * initial_rates(kernel)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


@given(st.integers(0, 1000))
def test_equal_rate_mixture_gives_equal_rates_wherever_one_exists(seed):
    kernel, _ = random_kernel(seed)
    mixture = equal_rate_mixture(kernel)
    assert (mixture >= 0).all()
    assert mixture.sum() == pytest.approx(1)
    exact = np.linalg.solve(kernel.matrix, np.ones(3))
    if (exact > 1e-6).all():
        rates = initial_rates(kernel._replace(weights=mixture))
        np.testing.assert_allclose(rates, rates[0], rtol=1e-6)
        assert rates[0] > 0
    elif (exact < -1e-6).any():
        assert (mixture == 0).any()


def test_a_kernel_of_zeros_has_no_mixture():
    assert not equal_rate_mixture(BehaviourKernel(["a", "b"], np.zeros((2, 2)), np.array([0.5, 0.5]))).any()


@pytest.mark.parametrize("seed", range(3))
def test_gaps_are_those_of_the_paper_for_any_number_of_behaviours_and_shares(seed):
    generator = np.random.default_rng(seed)
    differences, shares = generator.normal(size=(5, 7)), generator.dirichlet(np.ones(5))
    kernel = differences_kernel(differences, shares, behaviours=list("abcde"))
    pull = shares @ differences
    levels = differences @ pull / np.linalg.norm(pull)
    expected = (levels[:, None] - levels) / np.linalg.norm(differences, axis=1).max()
    np.testing.assert_allclose(priority_gaps(kernel), expected, atol=1e-12)
    assert not priority_gaps(differences_kernel(0 * differences, shares, behaviours=list("abcde"))).any()


def test_behaviours_that_no_mixture_brings_to_the_common_rate_are_named():
    for matrix, named in (([[1.0, 0.0], [0.0, 4.0]], ()), ([[1.0, 3.0], [3.0, 16.0]], ("b",))):
        kernel = BehaviourKernel(["a", "b"], np.array(matrix), np.array([0.5, 0.5]))
        failed = equal_rate_failures(kernel, equal_rate_mixture(kernel))
        assert failed == tuple(f"no mixture starts {name} at the common rate" for name in named)
