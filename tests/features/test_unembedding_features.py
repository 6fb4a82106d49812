"""One pass over pairs against a plain forward pass and autograd, pair by pair, on a tiny model."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import random_llama
from tests.reference.statistics import reference_kernel
from tests.reference.unembedding import reference_log_prob, reference_unembedding_gradient

from foretune.errors import UserError
from foretune.features import unembedding
from foretune.features.store import ShardColumn, ShardStore
from foretune.features.unembedding import PairFeatures, measure_pairs, read_features, read_states
from foretune.models.batches import targets_of
from foretune.models.encoding import EncodedPair
from foretune.models.pairs import EncodedPairs
from foretune.statistics.behaviours import yes_no_features

VOCABULARY = 50
# prompt, chosen, rejected: one token, several, unequal lengths, a common beginning, a prompt of one token
TOKENS = [
    ([1, 5, 9], [7], [8]),
    ([1, 6], [8], [7]),
    ([1, 4, 11, 30], [10, 2], [12, 2]),
    ([3], [20, 21, 22, 2], [23]),
    ([1, 2, 3, 4, 5, 6], [17, 18, 2], [17, 19, 25, 26, 2]),
    ([1, 33], [40], [41, 42, 2]),
    ([1, 44, 3], [9, 9, 9], [9, 9, 8]),
]


def pair(number, prompt, chosen, rejected):
    return EncodedPair(number, "b", "train", 1.0, prompt, chosen, rejected, False)


PAIRS = [pair(number, *tokens) for number, tokens in enumerate(TOKENS)]


@pytest.fixture(scope="module")
def model():
    return random_llama(VOCABULARY)


@torch.no_grad()
def response_states(model, prompt, response):
    """The hidden states that predict the response tokens, from one plain forward pass; with the one after the last."""
    ids = torch.tensor([prompt + response])
    states = model.model(input_ids=ids).last_hidden_state[0]
    return states[len(prompt) - 1 :]


def reference_pair(model, item):
    chosen = response_states(model, item.prompt_ids, item.chosen_ids)[:-1]
    rejected = response_states(model, item.prompt_ids, item.rejected_ids)[:-1]
    return chosen, item.chosen_ids, rejected, item.rejected_ids


def measured(model, pairs, store, **options):
    """Measure and read everything back."""
    measure_pairs(model, pairs, store, **options)
    found = read_features(store, len(pairs))
    return PairFeatures(*(column[:] for column in found))


def count_passes(model):
    """Count forward passes through the model's trunk from now on."""
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    return passes, handle


@pytest.mark.parametrize("packed", [True, False])
def test_features_equal_a_plain_forward_pass_and_autograd(model, tmp_path, packed):
    found = measured(model, PAIRS, ShardStore(tmp_path, "key"), sketch_dim=65536, packed=packed)
    weight = model.lm_head.weight.detach().double()
    references = [reference_pair(model, item) for item in PAIRS]
    chosen = [float(reference_log_prob(weight, states, ids)) for states, ids, _, _ in references]
    rejected = [float(reference_log_prob(weight, states, ids)) for _, _, states, ids in references]
    np.testing.assert_allclose(found.chosen_logp, chosen, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(found.rejected_logp, rejected, atol=1e-4, rtol=1e-5)
    gradients = [reference_unembedding_gradient(weight, item).numpy() for item in references]
    kernel = reference_kernel(gradients)
    norms = np.sqrt(np.diag(kernel))
    error = np.abs(found.sketch @ found.sketch.T - kernel) / np.outer(norms, norms)
    assert error.max() < 4 * np.sqrt(4 / 65536)
    for index, item in enumerate(PAIRS):
        np.testing.assert_allclose(found.first_state[index], references[index][0][0], atol=1e-4)
        for mean, ids in ((found.chosen_mean, item.chosen_ids), (found.rejected_mean, item.rejected_ids)):
            states = response_states(model, item.prompt_ids, ids)
            # after each response token but the last; for one token the state that predicts it
            expected = states[1:-1].mean(0) if len(ids) > 1 else states[0]
            np.testing.assert_allclose(mean[index], expected, atol=1e-4)


def test_log_probs_equal_the_models_own_logits(model, tmp_path):
    found = measured(model, PAIRS, ShardStore(tmp_path, "key"), sketch_dim=16)
    for index, item in enumerate(PAIRS):
        for logp, ids in ((found.chosen_logp, item.chosen_ids), (found.rejected_logp, item.rejected_ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([item.prompt_ids + ids])).logits[0]
            scores = torch.log_softmax(logits.double(), -1)[len(item.prompt_ids) - 1 : -1]
            expected = scores[torch.arange(len(ids)), ids].sum()
            assert logp[index] == pytest.approx(float(expected), abs=1e-4)


def test_packing_and_order_do_not_change_the_features(model, tmp_path):
    packed = measured(model, PAIRS, ShardStore(tmp_path / "a", "key"), sketch_dim=64)
    separate = measured(model, PAIRS, ShardStore(tmp_path / "b", "key"), sketch_dim=64, packed=False)
    reverse = measured(model, PAIRS[::-1], ShardStore(tmp_path / "c", "key"), sketch_dim=64)
    for name in packed._fields:
        np.testing.assert_allclose(getattr(separate, name), getattr(packed, name), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(getattr(reverse, name)[::-1], getattr(packed, name), atol=1e-4, err_msg=name)


def test_yes_no_features_have_the_exact_kernel_of_one_token_answers(model, tmp_path):
    yes, no = [7], [8]
    pairs = [pair(n, [1, 10 + n], *((yes, no) if n % 3 else (no, yes))) for n in range(5)]
    found = measured(model, pairs, ShardStore(tmp_path, "key"), sketch_dim=16)
    answer = np.array([0 if n % 3 else 1 for n in range(5)])
    features = yes_no_features(found.first_state, answer)
    weight = model.lm_head.weight.detach().double()
    exact = reference_kernel([reference_unembedding_gradient(weight, reference_pair(model, item)) for item in pairs])
    np.testing.assert_allclose(features @ features.T, exact, rtol=1e-4, atol=1e-4)


def test_the_states_read_back_give_the_same_log_probs(model, tmp_path):
    store = ShardStore(tmp_path, "key")
    found = measured(model, PAIRS, store, sketch_dim=16)
    states = torch.from_numpy(read_states(store, EncodedPairs(PAIRS).num_states)[:])
    targets = targets_of(PAIRS)
    scores = torch.log_softmax(states @ model.lm_head.weight.detach().T, -1)
    margin = torch.zeros(len(PAIRS)).index_add(0, targets.pair, scores[targets.state, targets.token] * targets.sign)
    np.testing.assert_allclose(margin, found.chosen_logp - found.rejected_logp, atol=1e-4)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(unembedding, "PAIRS_PER_SHARD", 3)


def test_a_second_pass_computes_only_the_missing_shard(model, tmp_path, small_shards):
    store = ShardStore(tmp_path, "key")
    first = measured(model, PAIRS, store, sketch_dim=16)
    assert [store.has(index) for index in range(4)] == [True, True, True, False]
    passes, handle = count_passes(model)
    again, done = measured(model, PAIRS, store, sketch_dim=16), []
    assert not passes
    store.path(1).unlink()
    restored = measured(model, PAIRS, store, sketch_dim=16, progress=done.append)
    handle.remove()
    assert len(passes) == 1
    assert done == [4, 7]
    for name in first._fields:
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        np.testing.assert_array_equal(getattr(restored, name), getattr(first, name))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "foreign"])
def test_a_damaged_or_foreign_shard_counts_as_missing(model, tmp_path, small_shards, damage):
    store = ShardStore(tmp_path, "key")
    first = measured(model, PAIRS, store, sketch_dim=16)
    file = store.path(0)
    content = file.read_bytes()
    if damage == "foreign":
        save_file({"states": torch.zeros(1)}, file, {"key": "another"})
    else:
        file.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff" * 100, "empty": b""}[damage])
    assert not store.has(0)
    passes, handle = count_passes(model)
    again = measured(model, PAIRS, store, sketch_dim=16)
    handle.remove()
    assert len(passes) == 2  # the shard's rows, and the beginning that they share
    np.testing.assert_array_equal(again.sketch, first.sketch)


def test_another_key_shares_nothing(tmp_path):
    ShardStore(tmp_path, "old").write(0, {"sketch": torch.ones(2)})
    store = ShardStore(tmp_path, "new")
    assert not store.has(0)
    with pytest.raises(UserError, match="another computation"):
        store.read(0, "sketch", 2)


def test_leftovers_are_removed(tmp_path):
    store = ShardStore(tmp_path, "key")
    for index in range(3):
        store.write(index, {"sketch": torch.ones(2)})
    (tmp_path / "states-00000.123.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    store.discard_foreign(2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "notes.txt",
        "states-00000.safetensors",
        "states-00001.safetensors",
    ]


def test_a_write_that_fails_leaves_the_old_shard(tmp_path, monkeypatch):
    store = ShardStore(tmp_path, "key")
    store.write(0, {"sketch": torch.ones(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="free some space"):
        store.write(0, {"sketch": torch.zeros(2)})
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["states-00000.safetensors"]
    assert torch.equal(store.read(0, "sketch", 2), torch.ones(2))


@pytest.mark.parametrize("damage", ["missing", "truncated", "short"])
def test_a_damaged_shard_is_told_on_reading(tmp_path, damage):
    store = ShardStore(tmp_path, "key")
    store.write(0, {"sketch": torch.ones(1 if damage == "short" else 2, 3)})
    if damage == "missing":
        store.path(0).unlink()
    if damage == "truncated":
        store.path(0).write_bytes(store.path(0).read_bytes()[:-4])
    with pytest.raises(UserError, match=r"states-00000\.safetensors .*repeat the command"):
        ShardColumn(store, "sketch", np.array([0, 2]))


def test_a_column_gives_rows_of_all_shards_in_the_order_asked_for(tmp_path):
    store = ShardStore(tmp_path, "key")
    rows = torch.arange(21.0).view(7, 3)
    for index, part in enumerate(rows.split(3)):
        store.write(index, {"sketch": part.to(torch.bfloat16)})
    column = ShardColumn(store, "sketch", np.array([0, 3, 6, 7]))
    assert (len(column), column.shape) == (7, (7, 3))
    np.testing.assert_array_equal(column[:], rows)
    np.testing.assert_array_equal(column[np.array([6, 0, 4, 4])], rows[[6, 0, 4, 4]])
    np.testing.assert_array_equal(column[2:5], rows[2:5])
