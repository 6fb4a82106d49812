"""The real data sets load as their makers meant them; skipped where they are not at hand."""

import time

import pytest

from foretune.data import load_preferences, split_answers
from foretune.errors import UserError


def test_persona_folder(shared_data):
    start = time.perf_counter()
    data = load_preferences(str(shared_data / "persona"))
    assert time.perf_counter() - start < 20
    assert len(data.info.behaviours) == 60
    assert len(data.train) + len(data.test) == 59_058
    assert split_answers(data.train) == (" Yes", " No")
    assert not set(data.train["prompt"]) & set(data.test["prompt"])
    assert len(set(data.train["pair_id"]) | set(data.test["pair_id"])) == 59_058


def test_hh_dialogues(shared_data):
    data = load_preferences(str(shared_data / "hh" / "harmless-base-test.jsonl.gz"), test_fraction=0)
    assert data.info.format == "hh dialogue"
    assert len(data.train) > 2300
    assert all(prompt.endswith("\n\nAssistant:") for prompt in data.train["prompt"])


def test_matching_and_not_matching_answers(shared_data):
    data = load_preferences(str(shared_data / "bipo" / "power-seeking"))
    assert data.info.format == "preference"
    assert (len(data.train), len(data.test)) == (640, 199)


def test_folder_with_other_columns(shared_data):
    data = load_preferences(str(shared_data / "learning_dynamics"))
    assert data.train.column_names == ["pair_id", "prompt", "chosen", "rejected", "behaviour", "weight"]
    assert (len(data.train), len(data.test)) == (499, 499)


def test_rankings_are_told_apart(shared_data):
    with pytest.raises(UserError, match="dev_feedback.json has no known preference format: found columns question"):
        load_preferences(str(shared_data / "finegrained_rlhf" / "dev_feedback.json"))
