"""RLHF: forecast of one-token answers against the real run, longer answers, over-optimisation, bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from tests.conftest import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from foretune.cli.rlhf import policy_table
from foretune.errors import UserError
from foretune.models.reward import load_reward_model
from foretune.models.sampling import draw_pairs
from foretune.report import build_report
from foretune.verbs.replay import replay
from foretune.verbs.rlhf import overoptimised, rlhf
from foretune.verbs.rlhf_job import rlhf_job_from
from foretune.verbs.verify import verify

SETTINGS = {
    "dtype": "float32",
    "trainable": "unembedding",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "num_generations": 4,
    "per_device_train_batch_size": 64,
    "observations": 4,
    "observe_pairs": 8,
    "disable_tqdm": True,
}
ANSWERS = 6
VOCABULARY = 1100


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"prompt": f"{word} {index} {index % 5}?", "chosen": " a", "rejected": " b", "behaviour": topic}
        for topic, word in {"gardens": "b", "boats": "a"}.items()
        for index in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def policy_folder(tokenizer, tmp_path_factory):
    """A policy of few tokens that gives one of a few answers."""
    model = random_llama(VOCABULARY, hidden_size=32, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id)
    prompt = torch.tensor([tokenizer("b 1 1?")["input_ids"]])
    assert int(prompt.max()) < VOCABULARY
    with torch.no_grad():
        state = model.base_model(prompt).last_hidden_state[0, -1]
        draw = torch.Generator().manual_seed(0)
        rows = 30 * state / state.square().sum() + 0.05 * torch.randn(ANSWERS, len(state), generator=draw)
        weight = torch.zeros(VOCABULARY, len(state))
        weight[1000 : 1000 + ANSWERS] = rows
        model.lm_head.weight = torch.nn.Parameter(weight)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judges(tiny_folder, tmp_path_factory):
    folders = []
    for seed in (1, 2):
        loaded = load_reward_model(str(tiny_folder), seed=seed).loaded
        loaded.model.score.weight.data *= 1 / loaded.model.score.weight.std() / 4
        folders.append(tmp_path_factory.mktemp("judge"))
        loaded.model.save_pretrained(folders[-1])
        loaded.tokenizer.save_pretrained(folders[-1])
    return folders


def run(policy, data, judges, out, **changes):
    given = {
        "model_name_or_path": str(policy),
        "dataset_name": str(data),
        "output_dir": str(out),
        "reward_model": str(judges[0]),
        "heldout_reward_model": str(judges[1]),
    }
    return rlhf(**{**given, **SETTINGS, **changes})


@pytest.fixture(scope="module")
def finished(policy_folder, prompts_file, judges, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "rlhf"
    return run(
        *(policy_folder, prompts_file, judges, out),
        **{"max_completion_length": 1, "candidates": ANSWERS, "learning_rate": 0.02, "max_steps": 30, "beta": 0.2},
    )


def curves(folder, behaviour="all", split="train"):
    rows = [
        row for row in folder.read_table("policy").to_pylist() if (row["behaviour"], row["split"]) == (behaviour, split)
    ]
    return {
        method: {name: np.array([row[name] for row in rows if row["method"] == method]) for name in rows[0]}
        for method in {row["method"] for row in rows}
    }


@pytest.mark.parametrize("behaviour", ["gardens", "boats", "all"])
def test_one_token_answers_go_as_the_gradient_flow_says(finished, behaviour):
    found = curves(finished, behaviour)
    said, happened = found["gradient_flow"], found["observed"]
    gain = happened["reward"][-1] - happened["reward"][0]
    np.testing.assert_allclose(said["reward"][0], happened["reward"][0], atol=1e-5)
    np.testing.assert_allclose(happened["kl"][0], 0, atol=1e-6)
    assert gain > 0.1
    # the run draws its answers: its noise falls with the size of the batch
    np.testing.assert_allclose(said["reward"][-1], happened["reward"][-1], atol=0.15 * gain)
    np.testing.assert_allclose(said["heldout_reward"][-1], happened["heldout_reward"][-1], atol=0.15 * gain)
    np.testing.assert_allclose(said["kl"][-1], happened["kl"][-1], rtol=0.3)


def test_no_run_exceeds_the_optimum(finished):
    found = curves(finished)
    value = {name: own["reward"] - 0.2 * own["kl"] for name, own in found.items()}
    assert value["optimum"][0] > value["observed"].max()
    assert value["observed"][-1] > value["observed"][0]


def test_the_table_shows_every_behaviour(finished):
    shown = policy_table(finished)
    assert list(map(str, shown.columns[0].cells)) == ["boats", "gardens", "all"]
    assert all(float(cell) >= 0 for cell in shown.columns[-1].cells)


def test_a_finished_run_is_not_repeated(finished):
    before = finished.stages["rlhf"]
    settings = {**finished.read_yaml("config.yaml"), "output_dir": str(finished.path)}
    assert rlhf(rlhf_job_from(**settings)).stages["rlhf"] == before


def test_other_prompts_or_rewards_under_the_same_names_are_another_run(policy_folder, prompts_file, judges, tmp_path):
    data, judge = tmp_path / "prompts.jsonl", tmp_path / "judge"
    shutil.copyfile(prompts_file, data)
    shutil.copytree(judges[0], judge)
    changes = {"max_completion_length": 1, "candidates": 2, "max_steps": 1, "observe_pairs": 2}
    keys = [run(policy_folder, data, (judge, judges[1]), tmp_path / "run", **changes).stage_key("rlhf")]
    data.write_text("".join(data.read_text().splitlines(keepends=True)[2:]))
    keys.append(run(policy_folder, data, (judge, judges[1]), tmp_path / "run", **changes).stage_key("rlhf"))
    shutil.copyfile(judges[1] / "model.safetensors", judge / "model.safetensors")
    keys.append(run(policy_folder, data, (judge, judges[1]), tmp_path / "run", **changes).stage_key("rlhf"))
    assert len(set(keys)) == 3


def test_other_verbs_say_what_shows_it(finished):
    for verb in (lambda: verify(finished), lambda: build_report(finished.path)):
        with pytest.raises(UserError, match="holds an RLHF run.*foretune rlhf --output_dir"):
            verb()


def test_a_run_can_be_replayed(policy_folder, prompts_file, judges, tmp_path):
    changes = {"max_completion_length": 1, "candidates": 2, "learning_rate": 0.01, "max_steps": 2, "observe_pairs": 2}
    first = run(policy_folder, prompts_file, judges, tmp_path / "run", **changes)
    _, differences = replay(first.path, tmp_path / "again")
    assert max(differences.values()) < 1e-6
    assert ("policy", "heldout_reward") in differences


def test_the_output_layer_over_a_bfloat16_decoder_is_trained(policy_folder, prompts_file, judges, tmp_path):
    changes = {"max_completion_length": 1, "candidates": ANSWERS, "learning_rate": 0.02, "max_steps": 6}
    found = curves(run(policy_folder, prompts_file, judges, tmp_path / "run", dtype="bfloat16", **changes))["observed"]
    assert found["reward"][-1] > found["reward"][0]


def test_longer_answers_are_forecast_in_first_order(policy_folder, prompts_file, judges, tmp_path):
    changes = {"max_completion_length": 3, "learning_rate": 0.001, "max_steps": 2}
    found = curves(run(policy_folder, prompts_file, judges, tmp_path / "run", **changes))
    said, happened = found["first_order"], found["observed"]
    assert said["reward"][0] == pytest.approx(happened["reward"][0])
    assert said["reward"][-1] > said["reward"][0]
    assert happened["kl"][0] == pytest.approx(0, abs=1e-4) and np.isfinite(happened["reward"]).all()


def test_drawn_answers_end_where_the_model_ends_them(policy_folder):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("b 1 1?", "a 2 3 4 5 6 7?")]
    before = torch.get_rng_state()
    pairs = draw_pairs(policy, prompts, tokenizer, max_tokens=3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [pair.prompt_ids for pair in pairs] == prompts
    assert all(1 <= len(ids) <= 3 for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    assert pairs[0].chosen_ids[0] in range(1000, 1000 + ANSWERS)
    again = draw_pairs(policy, prompts, tokenizer, max_tokens=3, seed=0)
    assert pairs == again


def test_overoptimisation_is_reward_that_rises_while_the_heldout_falls():
    def rows(behaviour, rewards, heldout):
        points = enumerate(zip(rewards, heldout, strict=True))
        return [
            {
                "method": "observed",
                "behaviour": behaviour,
                "split": "test",
                "step": step,
                "reward": reward,
                "heldout_reward": other,
            }
            for step, (reward, other) in points
        ]

    found = overoptimised([*rows("hacked", [0, 1, 2], [0, 0.5, -1.0]), *rows("fine", [0, 1, 2], [0, 0.5, 0.7])])
    assert found == {"hacked": {"peak_step": 1, "reward": 1, "heldout_reward": -1.5}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_model": None}, "pass --reward_model"),
        ({"candidates": 1}, "at least"),
        ({"num_generations": 1}, "TRL refuses"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tiny_folder, prompts_file, judges, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(tiny_folder, prompts_file, judges, tmp_path / "run", **changes)


def test_a_model_without_a_score_head_is_no_reward_model(tiny_folder, prompts_file, tmp_path):
    with pytest.raises(UserError, match="no score head"):
        run(tiny_folder, prompts_file, [tiny_folder, tiny_folder], tmp_path / "run")
