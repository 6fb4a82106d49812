"""KL of the trained model to its reference, against a slow pass of both models over every pair."""

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tests.cli.test_cli import run
from transformers import AutoModelForCausalLM

from foretune.data import load_preferences
from foretune.models.encoding import encode
from foretune.models.load import load_model
from foretune.records import load_run


@pytest.mark.parametrize("trainable", ["lora", "full", "unembedding"])
def test_divergence_is_the_mean_kl_over_response_tokens(tiny_folder, persona_file, tmp_path, trainable):
    out = tmp_path / "run"
    flags = ["--use_peft", "True", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    flags = flags if trainable == "lora" else ["--trainable", trainable]
    command = [
        *("train", "--model_name_or_path", str(tiny_folder), "--dataset_name", str(persona_file)),
        *("--output_dir", str(out), "--dtype", "float32", "--max_steps", "4", "--learning_rate", "0.01"),
        *("--test_fraction", "0.25", "--observe_pairs", "5", "--draws", "20", *flags),
    ]
    assert run(*command) == 0
    folder = load_run(out)
    kind = AutoPeftModelForCausalLM if trainable == "lora" else AutoModelForCausalLM
    policy, reference = kind.from_pretrained(out).eval(), AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    data = load_preferences(str(persona_file), test_fraction=0.25, seed=42)
    tokenizer = load_model(str(tiny_folder), dtype=torch.float32).tokenizer
    observed = set(folder.read_arrays("observed_pairs")["pair_id"].tolist())
    expected: dict = {}
    for split, rows in (("train", data.train), ("test", data.test)):
        for pair in encode(rows, tokenizer, split=split, max_length=1024):
            if pair.pair_id in observed:
                expected.setdefault(split, {}).setdefault(pair.behaviour, []).append(mean_kl(policy, reference, pair))
    for split, groups in expected.items():
        for name, values in groups.items():
            assert len(values) == 5
            found = folder.record["train"]["divergence"][split][name]
            assert found == pytest.approx(np.mean(values), rel=1e-4)
            assert found > 1e-4


@torch.no_grad()
def mean_kl(policy, reference, pair):
    """Over the tokens of both responses, the one after the prompt counted once."""
    found = []
    for number, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
        ids = torch.tensor([[*pair.prompt_ids, *response]])
        own, other = (model(ids).logits[0].double().log_softmax(-1) for model in (policy, reference))
        start = len(pair.prompt_ids) - 1
        places = range(start + (number > 0), start + len(response))
        found += [float((own[place].exp() * (own[place] - other[place])).sum()) for place in places]
    return np.mean(found)
