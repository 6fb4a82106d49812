"""Policy gradient of one-token answers against autograd, its closed-form optimum, and sampling."""

import numpy as np
import pytest
import torch

from foretune.dynamics.policy_gradient import first_order, logits_flow, output_layer_flow, policy_problem

PROMPTS, ANSWERS, HIDDEN = 5, 3, 8


@pytest.fixture
def problem():
    draw = np.random.default_rng(0)
    reference, rewards = draw.normal(size=(2, PROMPTS, ANSWERS)) / 2
    return policy_problem(reference, rewards, beta=0.5, shares=draw.uniform(0.5, 2, PROMPTS))


@pytest.fixture
def features():
    return np.random.default_rng(1).normal(size=(PROMPTS, HIDDEN))


def torch_value(problem, logits):
    policy = torch.log_softmax(logits, -1)
    reference = torch.log_softmax(torch.tensor(problem.reference), -1)
    own = (policy.exp() * (torch.tensor(problem.rewards) - problem.beta * (policy - reference))).sum(-1)
    return own @ torch.tensor(problem.shares)


def test_the_gradient_is_autograds(problem):
    logits = torch.tensor(np.random.default_rng(2).normal(size=(PROMPTS, ANSWERS)), requires_grad=True)
    value = torch_value(problem, logits)
    (slope,) = torch.autograd.grad(value, logits)
    found = logits.detach().numpy()
    np.testing.assert_allclose(problem.value(found), float(value.detach()), rtol=1e-12)
    np.testing.assert_allclose(problem.shares[:, None] * problem.gradient(found), slope.numpy(), atol=1e-14)


def test_no_policy_is_better_than_the_optimum(problem):
    best = problem.optimum()
    np.testing.assert_allclose(problem.value(best), problem.optimal_value(), rtol=1e-12)
    np.testing.assert_allclose(problem.gradient(best), 0, atol=1e-14)
    others = best + np.random.default_rng(3).normal(size=(200, PROMPTS, ANSWERS))
    assert (problem.value(others) < problem.optimal_value()).all()


def test_free_logits_end_at_the_optimum(problem):
    path = logits_flow(problem, times=np.array([0.0, 1.0, 400.0]))
    np.testing.assert_array_equal(path[0], problem.reference)
    values = problem.value(path)
    assert values[0] < values[1] < values[2]
    best = problem.optimum()
    np.testing.assert_allclose(problem.expected_reward(path[2]), problem.expected_reward(best), atol=1e-6)
    np.testing.assert_allclose(problem.kl(path[2]), problem.kl(best), atol=1e-6)


def test_an_output_layer_that_tells_all_prompts_apart_ends_there_too(problem, features):
    change = output_layer_flow(problem, features, times=np.array([0.0, 4000.0]))[-1]
    reached = problem.reference + features @ change.T
    np.testing.assert_allclose(problem.value(reached), problem.optimal_value(), atol=1e-6)


def test_the_output_layers_flow_is_the_limit_of_small_steps(problem, features):
    states, weight = torch.tensor(features), torch.zeros(ANSWERS, HIDDEN, dtype=torch.double, requires_grad=True)
    rate, steps = 1e-3, 1000
    for _ in range(steps):
        value = torch_value(problem, torch.tensor(problem.reference) + states @ weight.T)
        (slope,) = torch.autograd.grad(value, weight)
        weight = (weight + rate * slope).detach().requires_grad_()
    change = output_layer_flow(problem, features, times=np.array([0.0, rate * steps]))[-1]
    np.testing.assert_allclose(change, weight.detach().numpy(), atol=2e-3 * np.abs(change).max())


def test_without_kl_the_best_answer_takes_all():
    problem = policy_problem(np.zeros((1, 2)), np.array([[1.0, 0.0]]), beta=0.0)
    assert problem.expected_reward(logits_flow(problem, times=np.array([0.0, 1e4]))[-1])[0] > 0.999
    with pytest.raises(ValueError, match="best answer alone"):
        problem.optimum()


def test_first_order_growth_is_that_of_the_exact_flow(problem, features):
    """Pairs of answers drawn from the softmax policy give the slope of its exact flow, and the curvature of its KL."""
    draw, draws = np.random.default_rng(4), 20_000
    policy = np.exp(problem.reference) / np.exp(problem.reference).sum(1, keepdims=True)
    prompt_of = np.tile(np.arange(PROMPTS), draws)
    answers = np.array([[draw.choice(ANSWERS, draws, p=row) for row in policy] for _ in range(4)])
    answers = answers.transpose(0, 2, 1).reshape(2, 2, -1)  # (draw, side, prompt)
    sides = np.eye(ANSWERS)[answers[:, 0]] - np.eye(ANSWERS)[answers[:, 1]]
    gradients = (sides[..., None] * features[prompt_of][None, :, None]).reshape(2, len(prompt_of), -1)
    gaps = problem.rewards[prompt_of, answers[:, 0]] - problem.rewards[prompt_of, answers[:, 1]]
    behaviour_of = np.array(["a", "a", "b", "b", "b"])
    found = first_order(gradients, gaps, behaviour_of[prompt_of])
    even = policy_problem(problem.reference, problem.rewards, beta=problem.beta)
    time = 1e-3
    logits = even.reference + features @ output_layer_flow(even, features, times=np.array([0.0, time]))[-1].T
    gain = (even.expected_reward(logits) - even.expected_reward(even.reference)) / time
    spread = even.kl(logits) / time**2
    assert found.behaviours == ["a", "b"]
    own = [behaviour_of == name for name in found.behaviours]
    slopes = np.array([[curve[members].mean() for members in own] for curve in (gain, spread)])
    np.testing.assert_allclose(found.reward_rate, slopes[0], atol=0.02 * slopes[0].max())
    np.testing.assert_allclose(found.kl_rate, slopes[1], rtol=0.05)
