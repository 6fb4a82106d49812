"""Factors of whole weights give their gradients, on every architecture."""

import pytest
import torch
from tests.conformance.test_architectures import CONFIGS, make_model, make_pairs
from tests.reference.pair_gradients import pair_gradients

from foretune.errors import UserError
from foretune.features import weight_factors
from foretune.features.pair_gradients import batch_gradients, trainable_names
from foretune.features.store import ShardStore
from foretune.features.weight_factors import batch_weight_factors, measure_weight_factors, read_weight_factors
from foretune.models.batches import supports_packing

RANK = 60  # of the vocabulary: nothing is left out


def products(factors):
    return (factors.left.transpose(1, 2) @ factors.right).flatten(1)


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_give_the_gradients_of_all_weights(name):
    model, pairs = make_model(name), make_pairs()
    names = [own for own in trainable_names(model) if not (name == "mixtral" and ".mlp." in own)]
    expected = pair_gradients(model, pairs, names)
    vectors = torch.cat([expected[own] for own in names if model.get_parameter(own).ndim == 1], 1)
    found = batch_weight_factors(model, pairs, names, rank=RANK, packed=supports_packing(model))
    assert [own for own in names if model.get_parameter(own).ndim > 1] == list(found.matrices)
    assert (found.vectors - vectors).norm() < 1e-3 * vectors.norm()
    for own, factors in found.matrices.items():
        error = (products(factors) - expected[own]).norm() / expected[own].norm()
        assert error < 1e-3, f"{own}: {error:.1e}"


def test_padded_rows_give_the_same():
    model, pairs = make_model("llama"), make_pairs()
    names = trainable_names(model)
    found, expected = (batch_weight_factors(model, pairs, names, rank=RANK, packed=packed) for packed in (False, True))
    for own, factors in found.matrices.items():
        torch.testing.assert_close(products(factors), products(expected.matrices[own]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_padding_token_of_embeddings_is_not_trained(name):
    model, pairs = make_model(name), make_pairs()
    layer = model.get_input_embeddings()
    layer.padding_idx = pairs[0].prompt_ids[0]
    own = next(own for own, parameter in model.named_parameters() if parameter is layer.weight)
    found = batch_weight_factors(model, pairs, [own], rank=RANK)
    expected = pair_gradients(model, pairs, [own])[own]
    assert (products(found.matrices[own]) - expected).norm() < 1e-3 * expected.norm()
    assert found.vectors.shape == (len(pairs), 0)


def test_a_chunk_of_the_output_layer_may_end_within_a_pair(monkeypatch):
    model, pairs = make_model("llama"), make_pairs()
    names = ["lm_head.weight"]
    expected = products(batch_weight_factors(model, pairs, names, rank=RANK).matrices[names[0]])
    monkeypatch.setattr("foretune.features.head_gradient.states_at_once", lambda head: 2)
    found = products(batch_weight_factors(model, pairs, names, rank=RANK).matrices[names[0]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_small_rank_keeps_the_larger_part(rank):
    model, pairs = make_model("llama"), make_pairs()
    names = trainable_names(model)
    whole = batch_gradients(model, pairs, names).gradient
    found = batch_weight_factors(model, pairs, names, rank=rank).matrices
    lost = sum(float((products(own) - whole[name]).square().sum()) for name, own in found.items())
    total = sum(float(whole[name].square().sum()) for name in found)
    assert 1e-6 < lost / total < (0.5 if rank == 1 else 0.1)


def test_a_pass_is_read_back_in_the_order_of_its_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_factors, "PAIRS_PER_SHARD", 2)
    model, pairs = make_model("gpt2"), make_pairs()
    names, store = trainable_names(model), ShardStore(tmp_path, "key")
    measure_weight_factors(model, pairs, names, store, rank=4)
    alone = [batch_weight_factors(model, [pair], names, rank=4) for pair in pairs]
    found = read_weight_factors(store, len(pairs), alone[0].matrices)
    assert found.margin == pytest.approx([float(own.margin) for own in alone], abs=1e-4)
    expected = torch.cat([own.vectors for own in alone])
    assert (found.vectors.tensor() - expected).norm() < 0.01 * expected.norm()
    for name, (left, right) in found.matrices.items():
        product = (left.tensor().float().transpose(1, 2) @ right.tensor().float()).flatten(1)
        expected = torch.cat([products(own.matrices[name]) for own in alone])
        assert (product - expected).norm() < 0.02 * expected.norm(), name


def test_a_layer_that_does_not_keep_tokens_apart_is_refused():
    with pytest.raises(UserError, match="leave it out of the parameters"):
        model = make_model("mixtral")
        batch_weight_factors(model, make_pairs(), trainable_names(model), rank=4)
