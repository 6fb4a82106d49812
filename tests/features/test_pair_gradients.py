"""Pair gradients do not depend on their batch, and a pass can be resumed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.conftest import random_llama
from tests.reference.pair_gradients import pair_gradients

from foretune.features import pair_gradients as module
from foretune.features.pair_gradients import (
    batch_gradients,
    measure_gradients,
    read_gradients,
    trainable_names,
)
from foretune.features.store import ShardStore
from foretune.models.encoding import EncodedPair

VOCABULARY = 40


@pytest.fixture(scope="module")
def model():
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(random_llama(VOCABULARY), adapters).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def tokens(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return EncodedPair(seed, "b", "train", 1.0, *draw, False)


PAIRS = [tokens(lengths, seed) for seed, lengths in enumerate([(5, 1, 1), (9, 3, 2), (1, 4, 6), (14, 2, 7), (3, 1, 5)])]


def flat(gradient):
    return torch.cat(list(gradient.values()), 1)


@settings(max_examples=25)
@given(st.lists(st.tuples(*[st.integers(1, 8)] * 3), min_size=1, max_size=4), st.booleans())
def test_any_lengths_agree_with_one_autograd_pass_a_pair(model, lengths, packed):
    pairs = [tokens(own, seed) for seed, own in enumerate(lengths)]
    names = trainable_names(model)
    expected = pair_gradients(model, pairs, names)
    found = batch_gradients(model, pairs, names, packed=packed).gradient
    torch.testing.assert_close(flat(found).double(), flat(expected), atol=1e-5, rtol=1e-4)


def test_batch_size_row_order_and_padding_do_not_matter(model):
    names = trainable_names(model)
    whole = batch_gradients(model, PAIRS, names)
    order = [3, 0, 4, 1, 2]
    shuffled = batch_gradients(model, [PAIRS[i] for i in order], names)
    torch.testing.assert_close(flat(shuffled.gradient), flat(whole.gradient)[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled.margin, whole.margin[order])
    for index, pair in enumerate(PAIRS):
        alone = batch_gradients(model, [pair], names)
        torch.testing.assert_close(flat(alone.gradient)[0], flat(whole.gradient)[index], atol=1e-5, rtol=1e-5)


def test_identical_responses_and_a_shared_beginning_cancel(model):
    names = trainable_names(model)
    same = tokens((4, 3, 1))._replace(rejected_ids=tokens((4, 3, 1)).chosen_ids)
    found = batch_gradients(model, [same], names)
    assert float(found.margin.abs().max()) < 1e-5
    assert float(flat(found.gradient).abs().max()) < 1e-4


def test_model_is_left_as_it_was(model):
    names = trainable_names(model)
    model.train()
    batch_gradients(model, PAIRS, names)
    assert model.training and trainable_names(model) == names
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_resumes_and_is_read_back_in_order(model, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(module, "PAIRS_PER_SHARD", 2)
    names = trainable_names(model)
    sampled = {names[1]: torch.tensor([0, 3, 17])}
    store = ShardStore(tmp_path, "key")
    done = []
    measure_gradients(model, PAIRS, names, store, sampled=sampled, dtype=dtype, progress=done.append)
    assert done[-1] == len(PAIRS)
    store.path(1).unlink()
    calls = []
    monkeypatch.setattr(module, "batch_gradients", lambda *a, **k: calls.append(len(a[1])) or batch_gradients(*a, **k))
    measure_gradients(model, PAIRS, names, store, sampled=sampled, dtype=dtype)
    assert sum(calls) == 2
    whole = batch_gradients(model, PAIRS, names)
    found = read_gradients(store, len(PAIRS))
    expected = flat(whole.gradient | {names[1]: whole.gradient[names[1]][:, sampled[names[1]]]})
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.gradient.tensor().float(), expected, atol=1e-4, rtol=tolerance)
    torch.testing.assert_close(torch.from_numpy(found.margin), whole.margin.double(), atol=1e-5, rtol=1e-5)
