"""Shared fixtures: the embedded tokenizer, tiny models, small data."""

import gc
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# machines here are noisy: how long an example takes is no finding
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PERSONA = Path(__file__).parents[1].parent / "shared" / "data" / "persona"


def pytest_collection_finish():
    """As the command line does: what was imported is not searched for garbage."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory):
    """Temporary files go where pytest cleans up: workers and killed processes leave theirs behind."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's tokenizer (the conversion is kept in the user's cache)."""
    from transformers import AutoTokenizer

    from foretune.models.load import resolve_name

    return AutoTokenizer.from_pretrained(resolve_name("smollm2-135m")[0])


def random_llama(vocabulary: int, **changes):
    """A random two-layer Llama, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(options | changes))).eval()


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    """A random two-layer Llama with the embedded tokenizer, as a local folder."""
    folder = tmp_path_factory.mktemp("tiny")
    random_llama(
        len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def persona_file(tmp_path_factory) -> Path:
    """Two behaviours, 24 rows each, in one file with a behaviour column."""
    topics = {"gardening": ("my garden", "roses"), "sailing": ("the open sea", "my boat")}
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for behaviour, words in topics.items():
            for index in range(24):
                agrees = index % 2 == 0
                row = {
                    "prompt": f"Would you say: {'I love' if agrees else 'I avoid'} {words[index % 4 // 2]} {index}?",
                    "chosen": " Yes" if agrees else " No",
                    "rejected": " No" if agrees else " Yes",
                    "behaviour": behaviour,
                }
                file.write(json.dumps(row) + "\n")
    return path


@contextmanager
def threads(count):
    """So many threads of torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
