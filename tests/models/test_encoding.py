"""Encoding equals what TRL's DPOTrainer feeds its model."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from foretune.data import load_preferences
from foretune.errors import UserError
from foretune.models.encoding import Lost, encode

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TALK = [{"role": "user", "content": "Is it raining?"}]
ROWS = {
    "text": [
        {"prompt": "Say yes.\nAnswer:", "chosen": " Yes", "rejected": " No"},
        {"prompt": "A long prompt " * 30, "chosen": "short", "rejected": "a much longer answer " * 20},
        {"prompt": "Ends inside a wor", "chosen": "d, merged", "rejected": "k, merged too"},
        {"prompt": "Café — naïve 你好", "chosen": " oui 🙂", "rejected": " non"},
        {"prompt": "x", "chosen": "with its end<|im_end|>", "rejected": "without"},
    ],
    "conversation": [
        {
            "prompt": TALK,
            "chosen": [{"role": "assistant", "content": "Yes, it pours."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        {
            "prompt": [{"role": "system", "content": "Be brief."}, *TALK],
            "chosen": [{"role": "assistant", "content": "Yes"}],
            "rejected": [{"role": "assistant", "content": "It does not rain, and here is a very long reason " * 12}],
        },
    ],
}


def by_trl(rows, tiny_folder, tokenizer, max_length):
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder),
        args=DPOConfig(output_dir="unused", max_length=max_length, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [
        [
            (ids[mask.bool()].tolist(), ids[done.bool()].tolist())
            for ids, mask, done in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        for batch in batches
    ]


def numbered(rows):
    return [{"pair_id": index, "behaviour": "b", "weight": 1.0, **row} for index, row in enumerate(rows)]


@pytest.mark.parametrize("max_length", [None, 120, 40])
@pytest.mark.parametrize("kind", ROWS)
def test_equal_to_trl_token_for_token(kind, max_length, tiny_folder, tokenizer):
    rows = ROWS[kind]
    if max_length == 40:
        rows = [row for row in rows if "A long prompt" not in str(row["prompt"])] or rows
    expected = by_trl(rows, tiny_folder, tokenizer, max_length)
    found = encode(numbered(rows), tokenizer, split="train", max_length=max_length)
    assert [
        [(pair.prompt_ids + ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)] for pair in found
    ] == expected


def test_rows_whose_prompt_fills_the_length_are_dropped_and_counted(tiny_folder, tokenizer):
    lost = Lost.nothing()
    pairs = list(encode(numbered(ROWS["text"]), tokenizer, split="train", max_length=40, lost=lost))
    assert lost.too_long == {("b", "train"): 1}
    assert len(pairs) == len(by_trl(ROWS["text"], tiny_folder, tokenizer, 40))


def test_truncated_rows_are_counted(tokenizer):
    lost = Lost.nothing()
    pairs = list(encode(numbered(ROWS["conversation"]), tokenizer, split="test", max_length=60, lost=lost))
    assert lost.truncated == {("b", "test"): 1}
    assert [pair.truncated for pair in pairs] == [False, True]


def test_the_models_context_limits_too(tokenizer):
    lost = Lost.nothing()
    assert list(encode(numbered(ROWS["text"]), tokenizer, split="train", max_length=None, context=40, lost=lost))
    assert lost.too_long


@pytest.mark.parametrize("source", ["persona/subscribes-to-Buddhism.jsonl", "hh/harmless-base-test.jsonl.gz"])
def test_real_data_equals_trl(source, tiny_folder, tokenizer):
    if not (SHARED / source).exists():
        pytest.skip(f"real data not present: {source}")
    data = load_preferences(str(SHARED / source), max_pairs_per_behaviour=20)
    rows = [dict(row) for row in data.train.select(range(20))]
    expected = by_trl(
        [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows], tiny_folder, tokenizer, 512
    )
    found = encode(rows, tokenizer, split="train", max_length=512)
    assert [
        [(pair.prompt_ids + ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)] for pair in found
    ] == expected


def test_hh_text_as_trl_would_read_it_raw(tiny_folder, tokenizer):
    """HH rows have no prompt column; TRL cuts at the last common character, foretune after the last `Assistant:`."""
    path = SHARED / "hh/harmless-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip("real data not present: hh")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        raw = [json.loads(next(file)) for _ in range(10)]
    data = load_preferences(str(path), max_pairs_per_behaviour=None)
    texts = {row["prompt"] + row["chosen"] for row in data.train} | {row["prompt"] + row["chosen"] for row in data.test}
    assert all(row["chosen"] in texts for row in raw)


def test_states_do_not_depend_on_the_order_of_rows(tiny_folder, tokenizer):
    from foretune.scores import pair_scores

    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    pairs = list(encode(numbered(ROWS["text"][2:]), tokenizer, split="train", max_length=None))
    forward, backward = pair_scores(model, pairs), pair_scores(model, pairs[::-1])
    torch.testing.assert_close(forward.chosen, backward.chosen.flip(0), atol=1e-5, rtol=1e-6)


SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TEMPLATES = {
    "refuses a role": (SYSTEM + "{{ messages[0]['content'] }}", "System role not supported"),
    "reads what is not there": ("{{ messages[0].no.such }}", "has no attribute 'no'"),
    "is no template": ("{% if %}", "Expected an expression"),
}


@pytest.mark.parametrize("template, said", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_conversation_that_the_template_refuses_is_told(template, said, tokenizer, tiny_folder):
    other = type(tokenizer).from_pretrained(tiny_folder)
    other.chat_template = template
    row = ROWS["conversation"][1]
    with pytest.raises(UserError, match=rf"refuses a conversation \(.*{said}.*begins with \[.*'Be brief.'"):
        list(encode(numbered([row]), other, split="train", max_length=None))


def test_conversations_need_a_template(tokenizer, tiny_folder):
    other = type(tokenizer).from_pretrained(tiny_folder)
    other.chat_template = None
    assert list(encode(numbered(ROWS["text"]), other, split="train", max_length=None))
    with pytest.raises(UserError, match="has no chat template: take an instruct model, or give .* as text"):
        list(encode(numbered(ROWS["conversation"]), other, split="train", max_length=None))
    own = [{**row, "chat_template_kwargs": {"chat_template": tokenizer.chat_template}} for row in ROWS["conversation"]]
    ids = [pair.prompt_ids for pair in encode(numbered(own), other, split="train", max_length=None)]
    whole = encode(numbered(ROWS["conversation"]), tokenizer, split="train", max_length=None)
    assert ids == [pair.prompt_ids for pair in whole]


@pytest.mark.parametrize("extra", [{"tools": "3"}, {"tools": '["f"]'}, {"chat_template_kwargs": {"tokenize": False}}])
def test_arguments_that_the_template_cannot_take_are_told(extra, tokenizer):
    with pytest.raises(UserError, match="refuses a conversation"):
        list(encode(numbered([{**ROWS["conversation"][0], **extra}]), tokenizer, split="train", max_length=None))
