"""Factors of layer gradients: exact where the rank allows, as good as the best of their rank else."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.conformance.test_architectures import CONFIGS, make_model, make_pairs
from tests.reference.pair_gradients import pair_gradients

from foretune.errors import UserError
from foretune.features.store import ShardStore
from foretune.features.token_factors import (
    adapted_layers,
    batch_factors,
    layers_alike,
    low_rank,
    measure_factors,
    read_factors,
)
from foretune.models.batches import supports_packing

RANK = 40


def with_lora(name, **options):
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": "all-linear"} | options
    model = get_peft_model(make_model(name), LoraConfig(**settings))
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "lora_B" in own:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_give_the_gradients_of_the_adapters(name):
    """∂margin/∂B = s G Aᵀ and ∂margin/∂A = s Bᵀ G."""
    options = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    model, pairs = with_lora(name, **options), make_pairs()
    layers = adapted_layers(model)
    expected = pair_gradients(model, pairs, [matrix for layer in layers for matrix in (layer.a, layer.b)])
    for packed in {False, supports_packing(model)}:
        found = batch_factors(model, pairs, layers, rank=RANK, packed=packed)
        assert found.lost.max() < 1e-4
        for layer in layers:
            a, b = model.get_parameter(layer.a).detach(), model.get_parameter(layer.b).detach()
            weight_gradient = layer.scaling * found.outputs[layer.name].transpose(1, 2) @ found.inputs[layer.name]
            for own, gradient in ((layer.a, b.T @ weight_gradient), (layer.b, weight_gradient @ a.T)):
                error = (gradient.flatten(1) - expected[own]).norm() / expected[own].norm()
                assert error < 1e-3, f"{own}, packed={packed}: {error:.1e}"


def matrices(decay, tokens=30, rows=40, columns=50, seed=0):
    """a and δ of five products δᵀa whose singular values fall like decayᵏ."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(5, tokens, size, generator=draw).transpose(1, 2))[0].transpose(1, 2)
        for size in (rows, columns)
    )
    values = decay ** torch.arange(tokens)
    return (right * values[:, None]).double(), left.double()


@pytest.mark.parametrize("decay", [0.5, 0.8])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_low_rank_is_nearly_the_best_of_its_rank(decay, rank):
    a, delta = matrices(decay)
    found = low_rank(a, delta, rank)
    whole = delta.transpose(1, 2) @ a
    error = (whole - found.left.transpose(1, 2) @ found.right).square().sum((1, 2))
    best = torch.linalg.svdvals(whole)[:, rank:].square().sum(1)
    assert (error <= 1.1 * best + 1e-12).all()
    torch.testing.assert_close(found.squared_norm, whole.square().sum((1, 2)))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_no_more_tokens_than_the_rank_is_exact(tokens):
    a, delta = matrices(0.9, tokens=tokens)
    found = low_rank(a, delta, 8)
    assert found.left.shape == (5, 8, 40)
    torch.testing.assert_close(found.left.transpose(1, 2) @ found.right, delta.transpose(1, 2) @ a)


def test_padding_and_the_batch_do_not_matter():
    a, delta = matrices(0.7, tokens=6)
    expected = low_rank(a, delta, 3)
    padded = low_rank(*(torch.cat([side, torch.zeros(5, 9, side.shape[2])], 1) for side in (a, delta)), 3)
    alone = low_rank(a[2:3], delta[2:3], 3)
    product = expected.left.transpose(1, 2) @ expected.right
    torch.testing.assert_close(padded.left.transpose(1, 2) @ padded.right, product)
    torch.testing.assert_close(alone.left.transpose(1, 2) @ alone.right, product[2:3])


@pytest.mark.parametrize("tokens", [3, 6])
def test_fewer_tokens_than_columns_make_no_nan(tokens):
    """Products of what the range finder leaves in idle columns are denormal; LAPACK made NaN of some such matrices."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        delta = torch.nn.functional.one_hot(torch.randint(0, 35, (1, tokens), generator=draw), 35).float()
        a = torch.randn(1, tokens, 16, generator=draw)
        padded = [torch.cat([side, side.new_zeros(1, 20, side.shape[2])], 1) for side in (a, delta)]
        found = low_rank(*padded, 12)
        torch.testing.assert_close(
            found.left.transpose(1, 2) @ found.right, delta.transpose(1, 2) @ a, atol=1e-4, rtol=1e-4
        )


def test_a_pass_is_read_back_in_the_order_of_its_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("foretune.features.token_factors.PAIRS_PER_SHARD", 2)
    model, pairs = with_lora("llama"), make_pairs()
    layers = adapted_layers(model)
    store = ShardStore(tmp_path, "key")
    measure_factors(model, pairs, layers, store, rank=4)
    groups = layers_alike(model, layers)
    found = read_factors(store, len(pairs), len(groups))
    for index, pair in enumerate(pairs):
        alone = batch_factors(model, [pair], layers, rank=4)
        assert found.margin[index] == pytest.approx(float(alone.margin), abs=1e-4)
        assert found.lost[index] == pytest.approx(float(alone.lost), abs=1e-3)
        for (u, v), group in zip(found.stacks, groups, strict=True):
            for place, layer in enumerate(group):
                product = torch.from_numpy(u[np.array([index])][0, place].T @ v[np.array([index])][0, place])
                expected = alone.outputs[layer.name][0].T @ alone.inputs[layer.name][0]
                assert (product - expected).norm() <= 0.01 * expected.norm() + 1e-6


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_do_more_are_refused_by_name(options):
    with pytest.raises(UserError, match=r"the adapter of base_model.model.*--twin tangent"):
        adapted_layers(with_lora("llama", **options))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(UserError, match="no LoRA adapters"):
        adapted_layers(make_model("llama"))
