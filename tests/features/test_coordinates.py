"""Sampled coordinates: unbiased kernels, an honest error, a budget that is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_llama
from tests.features.test_pair_gradients import VOCABULARY, flat, tokens

from foretune.features.coordinates import kernel_error, sample_coordinates
from foretune.features.pair_gradients import batch_gradients, trainable_names

PAIRS = [tokens(lengths, seed) for seed, lengths in enumerate([(5, 1, 1), (9, 3, 2), (1, 4, 6), (14, 2, 7)] * 5)]


@pytest.fixture(scope="module")
def model():
    return random_llama(VOCABULARY, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(model):
    return batch_gradients(model, PAIRS, trainable_names(model)).gradient


def drawn(whole, sampled):
    """The sampled columns of whole gradients and their weights."""
    parts = [value[:, sampled[name].index] if name in sampled else value for name, value in whole.items()]
    weights = [sampled[name].weight if name in sampled else torch.ones(value.shape[1]) for name, value in whole.items()]
    return torch.cat(parts, 1), torch.cat(weights)


def kernel(gradient, weight):
    return (gradient * weight) @ gradient.T


@settings(max_examples=20)
@given(st.integers(60, 8000), st.integers(0, 100))
def test_a_budget_is_kept_and_weights_are_inverse_probabilities(model, whole, budget, seed):
    sampled = sample_coordinates(model, PAIRS, list(whole), budget=budget, seed=seed)
    sizes = {name: value.shape[1] for name, value in whole.items()}
    count = sum(len(sampled[name].index) if name in sampled else size for name, size in sizes.items())
    assert count <= budget or budget >= sum(sizes.values())
    for name, own in sampled.items():
        assert (own.index.diff() > 0).all() and 0 <= own.index[0] and own.index[-1] < sizes[name]
        assert (own.weight >= 1).all() and len(own.index) <= sizes[name]
    assert (sampled == {}) == (budget >= sum(sizes.values()))


def test_kernels_are_right_on_average_and_the_error_is_told(model, whole):
    exact = kernel(flat(whole), torch.ones(flat(whole).shape[1]))
    found, told, true = [], [], []
    for seed in range(60):
        gradient, weight = drawn(whole, sample_coordinates(model, PAIRS, list(whole), budget=800, seed=seed))
        found.append(kernel(gradient, weight))
        told.append(kernel_error(gradient, weight, seed=seed))
        true.append(float((found[-1] - exact).norm() / exact.norm()))
    mean = torch.stack(found).mean(0)
    typical = torch.tensor(true).square().mean().sqrt()
    assert (mean - exact).norm() / exact.norm() < 3 * typical / 60**0.5
    assert torch.tensor(told).square().mean().sqrt() == pytest.approx(float(typical), rel=0.3)


def test_sums_of_sizes_are_right_on_average(model, whole):
    """What an optimiser with equal steps everywhere does."""
    exact = flat(whole).abs().sum(1)
    found = []
    for seed in range(60):
        gradient, weight = drawn(whole, sample_coordinates(model, PAIRS, list(whole), budget=800, seed=seed))
        found.append(gradient.abs() @ weight)
    spread = torch.stack(found).std(0)
    assert ((torch.stack(found).mean(0) - exact).abs() < 4 * spread / 60**0.5).all()
    assert (spread < 0.2 * exact).all()


def test_more_coordinates_tell_more(model, whole):
    errors = []
    for budget in (500, 2000):
        sampled = sample_coordinates(model, PAIRS, list(whole), budget=budget)
        errors.append(kernel_error(*drawn(whole, sampled)))
    assert errors[1] < 0.7 * errors[0]
    assert kernel_error(*drawn(whole, {})) == 0


def test_embeddings_of_absent_tokens_are_not_drawn():
    model = random_llama(VOCABULARY)
    pairs = [tokens((5, 1, 1), seed) for seed in range(4)]
    present = {token for pair in pairs for token in (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)}
    name = "model.embed_tokens.weight"
    found = sample_coordinates(model, pairs, [name], budget=300)[name]
    assert {int(index) // 16 for index in found.index} <= present


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    sample_coordinates(model, PAIRS, trainable_names(model), budget=300)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
