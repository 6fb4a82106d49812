"""Scores and states are right for every architecture: packed, padded and alone."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import transformers as tf

from foretune.features.probes import probe
from foretune.models import attention, batches, product_attention
from foretune.models.batches import states_of, supports_packing, targets_of
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import head_of, untie_head
from foretune.scores import log_probs_of_states, pair_scores

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL),
    "qwen2": tf.Qwen2Config(**SMALL),
    "qwen3": tf.Qwen3Config(**SMALL, **HEADS),
    "gemma2": tf.Gemma2Config(**SMALL, **HEADS, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3": tf.Gemma3TextConfig(**SMALL, **HEADS, sliding_window=8),
    "mistral": tf.MistralConfig(**SMALL, sliding_window=8),
    "phi3": tf.Phi3Config(**SMALL),
    "gpt2": tf.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": tf.GPTNeoXConfig(**{**SMALL, "intermediate_size": 32}),
    "olmo2": tf.Olmo2Config(**SMALL),
    "granite": tf.GraniteConfig(**SMALL, logits_scaling=3.0),
    "mixtral": tf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
UNPACKED = {
    "bloom": tf.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2),
    "gpt_oss": tf.GptOssConfig(**SMALL, **HEADS, num_local_experts=4, rope_parameters={"rope_type": "default"}),
}


def make_pairs(seed: int = 0) -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    shapes = [(12, 3, 5), (4, 1, 1), (7, 2, 1), (20, 6, 2), (5, 1, 4)]
    return [EncodedPair(i, "b", "train", 1.0, ids(p), ids(c), ids(r), False) for i, (p, c, r) in enumerate(shapes)]


def make_model(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(deepcopy((CONFIGS | UNPACKED)[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def naive_log_prob(model: tf.PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(response))


@pytest.mark.parametrize("name", CONFIGS | UNPACKED)
@torch.no_grad()
def test_scores_equal_one_plain_forward_pass_a_response(name):
    model, pairs = make_model(name), make_pairs()
    expected = torch.tensor(
        [[naive_log_prob(model, p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]],
        dtype=torch.float64,
    ).view(-1, 2)
    for packed in {False, supports_packing(model)}:
        for budget in (10**6, 30):
            found = torch.stack(pair_scores(model, pairs, packed=packed, budget=budget), 1)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


def with_beginnings(pairs: list[EncodedPair]) -> list[EncodedPair]:
    """Some rows behind a common beginning, some behind a part of it, some behind another, some alone."""
    long, other = list(range(5, 31)), [40, 41, 42, 43]
    return [
        pair._replace(prompt_ids=beginning + pair.prompt_ids)
        for beginning in (long, long[:6], other, [])
        for pair in pairs
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("long_beginning", [0, 8])
@torch.no_grad()
def test_states_equal_those_of_separate_sequences_to_1e_5(name, long_beginning, monkeypatch):
    monkeypatch.setattr(product_attention, "LONG_BEGINNING", long_beginning)
    model, pairs = make_model(name), with_beginnings(make_pairs())
    expected = ForwardPass(model, packed=False).states(pairs)
    assert supports_packing(model)
    for options in ({"share": False}, {"overhead": 0}, {"overhead": 0, "budget": 40}, {"overhead": 30}):
        found = ForwardPass(model, **options).states(pairs)
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@torch.no_grad()
def test_tokens_in_line_and_in_rows_give_the_same(name, monkeypatch):
    model, pairs, found = make_model(name), with_beginnings(make_pairs()), []
    for little in (0.0, 1.0):
        monkeypatch.setattr(batches, "LITTLE_PADDING", little)
        found.append(ForwardPass(model, overhead=0).states(pairs))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@torch.no_grad()
def test_both_ways_of_attending_agree(name, monkeypatch):
    model, pairs = make_model(name), with_beginnings(make_pairs())
    found = []
    monkeypatch.setitem(product_attention.SCORES_AT_ONCE, "cpu", 500)
    for faster, queries in ((False, 128), (True, 128), (True, 7)):  # the fused kernel, products
        monkeypatch.setattr(attention, "suits_products", lambda *_, faster=faster: faster)
        monkeypatch.setattr(product_attention, "QUERIES_AT_ONCE", queries)
        found.append(ForwardPass(model, overhead=0).states(pairs))
    for products in found[1:]:
        torch.testing.assert_close(products, found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNPACKED)
@torch.no_grad()
def test_a_model_whose_attention_is_its_own_is_not_packed(name):
    model, pairs = make_model(name), make_pairs()
    assert not supports_packing(model)
    found = probe(model, pairs)
    assert not found.packed and "twice as long" in found.notes[-1]


@torch.no_grad()
def test_the_usual_attention_is_back_after_a_pass():
    model = make_model("qwen2")
    before = model.config._attn_implementation
    ForwardPass(model, overhead=0).states(make_pairs())
    assert model.config._attn_implementation == before != attention.NAME


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "mixtral"])
@pytest.mark.parametrize("queries", [7, 128])
def test_gradients_flow_through_shared_prompts(name, queries, monkeypatch):
    monkeypatch.setattr(product_attention, "QUERIES_AT_ONCE", queries)
    monkeypatch.setitem(product_attention.SCORES_AT_ONCE, "cpu", 500)
    model, pairs = make_model(name), make_pairs()
    gradients = []
    for packed, attention_of in ((False, nullcontext), (True, nullcontext), (True, attention.tree_attention_of)):
        model.zero_grad()
        with attention_of(model):
            states = states_of(model, pairs, packed=packed)
        scores = log_probs_of_states(head_of(model, live=True), states, targets_of(pairs), len(pairs))
        (scores.chosen - scores.rejected).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for packed in gradients[1:]:
        torch.testing.assert_close(packed, gradients[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_dropout_of_attention_is_left_to_usual_functions(name):
    model, pairs = make_model(name), with_beginnings(make_pairs())
    expected = ForwardPass(model, overhead=0).states(pairs)
    model.train()
    for dropout, same in ((1e-9, True), (0.5, False)):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        found = ForwardPass(model, overhead=0).states(pairs)
        assert torch.allclose(found, expected, atol=1e-4) == same


@torch.no_grad()
def test_untying_leaves_logits_and_frees_the_head():
    model = make_model("gemma3")
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    untie_head(model)
    model.get_input_embeddings().weight.mul_(1.0)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(model(ids).logits, before)
