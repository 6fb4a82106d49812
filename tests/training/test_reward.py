"""Reward models: features are the model's own, and the score head's forecast is the real run."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import foretune
from foretune.cli.reward import ensemble_table
from foretune.errors import UserError
from foretune.models.reward import FrozenReward, last_states, load_reward_model, rewards
from foretune.verbs.progress import Progress
from foretune.verbs.replay import replay
from foretune.verbs.reward_data import prepare_reward
from foretune.verbs.reward_job import reward_job_from

SETTINGS = {
    "dtype": "float32",
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.02,
    "observations": 5,
    "draws": 50,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def free_text_file(tmp_path_factory):
    """Two behaviours of 20 rows, answers of several lengths, with the margins that TRL's reward models read."""
    path = tmp_path_factory.mktemp("data") / "free.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for behaviour, (good, bad) in {"polite": ("please", "now"), "brief": ("ok", "well, you see")}.items():
            for index in range(20):
                row = {
                    "prompt": f"Question {index}:",
                    "chosen": f" {good} take {'the ' * (index % 4)}{index}",
                    "rejected": f" {bad} take {index % 7} of them",
                    "behaviour": behaviour,
                    "margin": (index % 3) / 2,
                }
                file.write(json.dumps(row) + "\n")
    return path


def run(folder, data, out, **changes):
    given = {"model_name_or_path": str(folder), "dataset_name": str(data), "output_dir": str(out)}
    return foretune.reward(**{**given, **SETTINGS, "trainable": "score", **changes})


@pytest.fixture(scope="module")
def finished(tiny_folder, free_text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reward"
    return run(tiny_folder, free_text_file, out, center_rewards_coefficient=0.01, ensemble=3)


def difference(folder):
    said, happened = folder.read_arrays("forecast_pairs"), folder.read_arrays("observed_pairs")
    np.testing.assert_array_equal(said["pair_id"], happened["pair_id"])
    np.testing.assert_array_equal(said["steps"], happened["steps"])
    assert np.abs(happened["margins"][-1] - happened["margins"][0]).max() > 0.1
    return np.abs(said["margins"] - happened["margins"]).max()


def test_the_states_are_those_that_the_score_head_reads(tiny_folder):
    model, tokenizer = load_reward_model(str(tiny_folder)).loaded[:2]
    end = tokenizer.eos_token_id
    assert model.config.pad_token_id == end  # the end of a sequence counts as padding
    sequences = [[5, 6, 7, end], [8, 9], [10, 11, 12, 13, 14], [15, end]]
    states = last_states(model, sequences)
    told = rewards(model, sequences)
    torch.testing.assert_close(model.score(states)[:, 0], told)
    alone = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
    torch.testing.assert_close(told, torch.tensor(alone))


@pytest.mark.parametrize("pads_with_the_end", [True, False])
def test_a_frozen_reward_model_says_what_the_model_says(tiny_folder, pads_with_the_end):
    model, tokenizer = load_reward_model(str(tiny_folder)).loaded[:2]
    if not pads_with_the_end:
        model.config.get_text_config().pad_token_id = 0
    end, generator = tokenizer.eos_token_id, torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 500, (3, 30), generator=generator).tolist()
    sequences = [[*prompt[: 20 + row], answer, end] for row, prompt in enumerate(prompts) for answer in range(7, 15)]
    judge = FrozenReward(model)
    torch.testing.assert_close(judge(sequences), rewards(model, sequences), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(judge(sequences[:3]), judge(sequences)[:3], atol=0, rtol=0)


def test_the_forecast_of_the_score_head_is_the_run_of_the_trainer(finished):
    assert difference(finished) < 1e-4
    found = finished.read_json("verification.json")
    assert found["margin_slope"] == pytest.approx(1, abs=1e-4)
    assert found["relative_loss_error"] < 1e-3


def test_training_on_stored_states_gives_the_same_reward_model(finished, tiny_folder, free_text_file, tmp_path):
    changes = {"center_rewards_coefficient": 0.01, "stored_states": True, "forecast_alone": False}
    quick = run(tiny_folder, free_text_file, tmp_path / "run", **changes)
    ends = [folder.read_arrays("observed_pairs")["margins"][-1] for folder in (quick, finished)]
    np.testing.assert_allclose(*ends, atol=1e-4)
    heads = [load_reward_model(str(folder.path)).loaded.model.score.weight for folder in (quick, finished)]
    torch.testing.assert_close(*heads, atol=1e-4, rtol=1e-4)
    assert "one computation" in quick.record["train"]["notes"][0]

    _, differences = replay(quick.path, tmp_path / "again")
    assert max(differences.values()) < 1e-6
    assert ("observed", "margin") in differences


@pytest.mark.parametrize("changes", [{"optim": "sgd", "gradient_accumulation_steps": 2}, {"max_grad_norm": 0.01}])
def test_without_centring_and_with_other_optimisers_too(tiny_folder, persona_file, tmp_path, changes):
    folder = run(tiny_folder, persona_file, tmp_path / "run", forecast_alone=False, learning_rate=0.1, **changes)
    assert difference(folder) < 1e-4


def test_gradient_flow_is_the_limit_of_small_steps(tiny_folder, free_text_file, tmp_path):
    folder = run(
        tiny_folder,
        free_text_file,
        tmp_path / "run",
        **{"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-3},
        **{"per_device_train_batch_size": 64, "max_steps": 40, "forecast_alone": False},
    )
    rows = folder.read_table("forecast").to_pylist()
    curves = {
        method: np.array([row["margin"] for row in rows if row["method"] == method and row["split"] == "train"])
        for method in ("simulated_run", "gradient_flow")
    }
    moved = np.ptp(curves["simulated_run"])
    assert np.abs(curves["gradient_flow"] - curves["simulated_run"]).max() < 0.02 * moved


def test_losses_are_those_that_the_trainer_minimises(finished, free_text_file):
    """The mean loss of the observed pairs at the end is TRL's own with the saved model."""
    rows = {row["split"]: row for row in finished.read_table("observed").to_pylist() if row["behaviour"] == "all"}
    model = AutoModelForSequenceClassification.from_pretrained(finished.path)
    pairs = [row for row in finished.read_table("pairs").to_pylist() if row["split"] == "train"]
    texts = {json.loads(line)["prompt"] + json.loads(line)["chosen"]: json.loads(line) for line in open(free_text_file)}
    data = Dataset.from_list(
        [
            {name: texts[pair["prompt"] + pair["chosen"]][name] for name in ("prompt", "chosen", "rejected", "margin")}
            for pair in pairs
        ]
    )
    tokenizer = load_reward_model(str(finished.path)).loaded.tokenizer
    config = RewardConfig(
        output_dir=str(finished.path / "again"), use_cpu=True, bf16=False, report_to=[], per_device_eval_batch_size=64
    )
    trainer = RewardTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(rows["train"]["loss"], rel=1e-4)


def test_ensembles_tell_mean_and_spread_of_each_behaviour(finished):
    rows = finished.read_table("ensemble").to_pylist()
    assert {row["behaviour"] for row in rows} == {"polite", "brief", "all"}
    assert all(row["margin_spread"] > 0 and 0 <= row["agreement"] <= 1 for row in rows)
    heads = finished.read_arrays("ensemble")["heads"]
    own = AutoModelForSequenceClassification.from_pretrained(finished.path).score.weight[0].detach().numpy()
    np.testing.assert_allclose(heads[0], own, atol=1e-4)
    assert np.linalg.norm(heads[1] - heads[2]) > 0.01
    assert ensemble_table(finished).row_count == 3


def test_a_run_that_is_there_is_not_repeated(finished):
    before = finished.stages
    again = foretune.reward(
        **{**finished.read_yaml("config.yaml"), "output_dir": str(finished.path)}  # as config.yaml says it
    )
    assert again.stages["forecast"] == before["forecast"] and again.stages["train"] == before["train"]


def test_lora_is_forecast_by_the_head_and_says_so(tiny_folder, persona_file, tmp_path):
    folder = run(tiny_folder, persona_file, tmp_path / "run", trainable="lora", max_steps=3, forecast_alone=False)
    assert "score head alone" in folder.record["forecast"]["notes"][0]
    moved = folder.read_arrays("observed_pairs")["margins"]
    assert np.abs(moved[-1] - moved[0]).max() > 0
    assert (folder.path / "adapter_model.safetensors").exists()


def test_halves_share_no_prompt_and_make_the_whole(tiny_folder, free_text_file, tmp_path):
    job = {"model_name_or_path": str(tiny_folder), "dataset_name": str(free_text_file), **SETTINGS}
    prompts = {
        half: {tuple(pair.prompt_ids) for pair in data.prepared.pairs if pair.split == "train"}
        for half in ("first", "second", None)
        for data in [prepare_reward(reward_job_from(**job, half=half, output_dir=str(tmp_path)), Progress.silent())[0]]
    }
    assert not prompts["first"] & prompts["second"]
    assert min(len(prompts["first"]), len(prompts["second"])) > 4
    assert prompts["first"] | prompts["second"] == prompts[None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": "full", "ensemble": 2}, "pass --trainable score"),
        ({"ensemble": 1}, "at least 2"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"max_length": 2}, "raise --max_length"),
        ({"beta": 0.1}, "unknown argument beta"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tiny_folder, persona_file, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(tiny_folder, persona_file, tmp_path / "run", **changes)


def test_margins_that_are_no_numbers_are_refused(tiny_folder, free_text_file, tmp_path):
    rows = [json.loads(line) for line in open(free_text_file)]
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(json.dumps({**row, "margin": "big" if i == 3 else 1.0}) for i, row in enumerate(rows)))
    with pytest.raises(UserError, match="no finite number in 1 rows"):
        run(tiny_folder, path, tmp_path / "run")
