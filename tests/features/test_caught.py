"""What is caught for every token adds up to the gradients of the pairs, in a line and in padded rows."""

import pytest
import torch
from tests.conformance.test_architectures import make_model, make_pairs
from tests.reference.pair_gradients import pair_gradients

from foretune.features.caught import PairTokens, catching
from foretune.models import batches
from foretune.models.attention import tree_attention_of
from foretune.models.batches import states_of, targets_of
from foretune.models.head import head_of
from foretune.scores import log_probs_of_states


@pytest.mark.parametrize(("packed", "little"), [(True, 0.0), (True, 1.0), (False, 1.0)])
def test_outer_products_of_each_pairs_tokens_are_its_gradient(packed, little, monkeypatch):
    monkeypatch.setattr(batches, "LITTLE_PADDING", little)
    model, pairs = make_model("llama").double(), make_pairs()
    layer, tokens, found = model.model.layers[0].mlp.up_proj, PairTokens(pairs), []

    def receive(caught, a, delta):
        assert caught is layer and tokens.fit(a) and tokens.fit(delta)
        owner = tokens.owner(a)
        for pair in range(len(pairs)):
            own = owner == pair
            found.append(delta.flatten(0, 1)[own].T @ a.flatten(0, 1)[own])
        products = tokens.by_pair(delta).transpose(1, 2) @ tokens.by_pair(a)
        torch.testing.assert_close(products, torch.stack(found))

    with tree_attention_of(model), catching([layer], receive):
        states = states_of(model, pairs, packed=packed)
        scores = log_probs_of_states(head_of(model, live=True), states, targets_of(pairs), len(pairs))
        (scores.chosen - scores.rejected).sum().backward()
    expected = pair_gradients(model, pairs, ["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(torch.stack(found).flatten(1), *expected.values(), atol=1e-4, rtol=1e-4)


def test_tokens_are_found_on_either_side_of_the_heads_and_not_among_features():
    tokens = PairTokens(make_pairs())
    total = sum(tokens.lengths)
    line = torch.randn(1, total, total)
    heads = torch.randn(1, 2, total, 4)
    assert tokens.fit(line) and tokens.fit(heads) and not tokens.fit(torch.randn(1, total, total, 4))
    assert torch.equal(tokens.by_pair(heads), tokens.by_pair(heads.transpose(1, 2)))
    for pair, (rows, length) in enumerate(zip(tokens.by_pair(line), tokens.lengths, strict=True)):
        start = sum(tokens.lengths[:pair])
        assert torch.equal(rows[:length], line[0, start : start + length]) and not rows[length:].any()
