"""`PreferenceTrainer` is TRL's trainer, with behaviours, weights and shared prompts."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tests.conformance.test_architectures import HEADS, SMALL
from transformers import AutoModelForCausalLM, GptOssConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer

from foretune.data import load_preferences
from foretune.errors import UserError
from foretune.models.encoding import encode
from foretune.models.head import untie_head
from foretune.scores import pair_scores
from foretune.training.observer import BehaviourObserver
from foretune.training.trainer import PreferenceTrainer


@pytest.fixture(scope="module")
def rows(persona_file):
    return load_preferences(str(persona_file), test_fraction=0.25)


def config(folder, **changes):
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 6,
        "max_steps": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return DPOConfig(**{**options, **changes})


def build(cls, folder, rows, args, *, trainable="full", evaluation=None, **options):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if trainable == "unembedding":
        model.requires_grad_(False)
        untie_head(model)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if trainable == "lora" else None
    from transformers import AutoTokenizer

    return cls(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora,
        **options,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("trainable", ["full", "lora", "unembedding"])
def test_same_losses_and_metrics_as_trl(trainable, precompute, tiny_folder, rows, tmp_path):
    plain = rows.train.select_columns(["prompt", "chosen", "rejected"])
    args = {"precompute_ref_log_probs": precompute}
    theirs = build(DPOTrainer, tiny_folder, plain, config(tmp_path / "a", **args), trainable=trainable)
    ours = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path / "b", **args), trainable=trainable)
    np.testing.assert_allclose(losses(ours), losses(theirs), atol=2e-5)
    for mine, other in zip(ours.state.log_history[:4], theirs.state.log_history[:4], strict=True):
        for key in ("rewards/margins", "logps/chosen", "entropy", "logits/rejected", "mean_token_accuracy"):
            assert mine[key] == pytest.approx(other[key], abs=2e-4), key


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "robust", "apo_zero", "nca_pair", "discopop", "sigmoid_norm"])
def test_every_trl_loss_passes_through(loss_type, tiny_folder, rows, tmp_path):
    args = {"loss_type": [loss_type], "max_steps": 2, "precompute_ref_log_probs": True}
    theirs = build(DPOTrainer, tiny_folder, rows.train, config(tmp_path / "a", **args))
    ours = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path / "b", **args))
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4, atol=2e-5)


def test_wpo_weighting_and_accumulation_pass_through(tiny_folder, rows, tmp_path):
    args = {"use_weighting": True, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}
    theirs = build(DPOTrainer, tiny_folder, rows.train, config(tmp_path / "a", **args))
    ours = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path / "b", **args))
    np.testing.assert_allclose(losses(ours), losses(theirs), atol=2e-5)


def test_a_model_with_attention_sinks_trains_as_with_trl(tokenizer, rows, tmp_path):
    folder = tmp_path / "model"
    options = {**SMALL, **HEADS, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GptOssConfig(**options, num_local_experts=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    args = {"router_aux_loss_coef": 0.0}  # otherwise TRL's own head is kept
    theirs = build(DPOTrainer, folder, rows.train, config(tmp_path / "a", **args))
    ours = build(PreferenceTrainer, folder, rows.train, config(tmp_path / "b", **args))
    np.testing.assert_allclose(losses(ours), losses(theirs), atol=2e-5)


def test_recomputed_passes_are_the_same(tiny_folder, rows, tmp_path):
    found = []
    for checkpointing in (False, True):
        args = config(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        found.append(losses(build(PreferenceTrainer, tiny_folder, rows.train, args)))
    np.testing.assert_allclose(*found, atol=1e-6)


def test_references_are_computed_once_where_the_run_sees_every_row(tiny_folder, rows, tmp_path):
    steps = len(rows.train) // config(tmp_path).per_device_train_batch_size
    for max_steps, once in ((steps + 1, True), (1, False), (-1, True)):
        args = config(tmp_path, max_steps=max_steps)
        trainer = build(PreferenceTrainer, tiny_folder, rows.train, args)
        assert trainer.precompute_ref_logps == once
        assert not args.precompute_ref_log_probs
        kept = build(PreferenceTrainer, tiny_folder, rows.train, args, share_prompts=False)
        assert not kept.precompute_ref_logps


def test_trls_own_head_is_kept_on_request(tiny_folder, rows, tmp_path):
    trainer = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path), share_prompts=False)
    assert not hasattr(trainer.model, "_scores_shared_prompts")
    assert len(losses(trainer)) == 4


def test_metrics_per_behaviour_average_to_trls(tiny_folder, rows, tmp_path):
    trainer = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path, logging_steps=2))
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        counts = [entry.get(f"num_pairs/{name}", 0) for name in ("gardening", "sailing")]
        assert sum(counts) == 12
        for key in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
            values = [entry.get(f"{key}/{name}", 0.0) for name in ("gardening", "sailing")]
            assert np.average(values, weights=counts) == pytest.approx(entry[key], abs=1e-5)
        assert entry["displacement/chosen"] == pytest.approx(entry["rewards/chosen"] / 0.1, abs=1e-4)


def test_evaluation_sets_do_not_overwrite_each_other(tiny_folder, rows, tmp_path):
    sets = {
        name: rows.test.filter(lambda row, name=name: row["behaviour"] == name) for name in ("gardening", "sailing")
    }
    args = config(tmp_path, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=5)
    trainer = build(PreferenceTrainer, tiny_folder, rows.train, args, evaluation=sets)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for name, part in sets.items():
        assert logged[f"eval_{name}_num_pairs/{name}"] == len(part)
        assert f"eval_{name}_rewards/margins" in logged
    assert "eval_rewards/margins" not in logged
    assert "eval_gardening_rewards/margins/sailing" not in logged


def test_a_single_evaluation_set_keeps_trls_keys(tiny_folder, rows, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer = build(PreferenceTrainer, tiny_folder, rows.train, args, evaluation=rows.test)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/margins/sailing"} <= set(logged)


def weighted(rows, weights):
    return rows.remove_columns("weight").add_column("weight", [float(weight) for weight in weights])


def final_weights(trainer):
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_equal_weights_change_nothing(tiny_folder, rows, tmp_path):
    one = build(PreferenceTrainer, tiny_folder, rows.train, config(tmp_path / "a"))
    seven = build(PreferenceTrainer, tiny_folder, weighted(rows.train, [7] * len(rows.train)), config(tmp_path / "b"))
    torch.testing.assert_close(final_weights(one), final_weights(seven))


def test_weights_scale_each_rows_gradient(tiny_folder, rows, tmp_path):
    """One full batch with integer weights takes the same step as the rows repeated that often."""
    part = rows.train.select(range(6))
    args = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    counts = [1, 2, 0, 3, 1, 1]
    repeated = part.select([index for index, count in enumerate(counts) for _ in range(count)])
    by_weight = build(PreferenceTrainer, tiny_folder, weighted(part, counts), config(tmp_path / "a", **args))
    by_rows = build(
        PreferenceTrainer, tiny_folder, repeated, config(tmp_path / "b", per_device_train_batch_size=8, **args)
    )
    start = torch.cat([p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_folder).parameters()])
    moved = final_weights(by_weight) - start
    assert moved.norm() > 0
    torch.testing.assert_close(moved, final_weights(by_rows) - start, atol=1e-6, rtol=1e-3)


def test_weights_with_a_sorting_loss_are_refused(tiny_folder, rows, tmp_path):
    with pytest.raises(UserError, match="sorts the batch"):
        build(
            PreferenceTrainer,
            tiny_folder,
            weighted(rows.train, range(len(rows.train))),
            config(tmp_path, loss_type=["aot"]),
        )


def encoded(rows, tokenizer):
    return [
        pair
        for split, part in (("train", rows.train), ("test", rows.test))
        for pair in encode(part, tokenizer, split=split, max_length=None)
    ]


def test_observer_on_a_plain_trainer(tiny_folder, tokenizer, rows, tmp_path):
    pairs = encoded(rows, tokenizer)
    observer = BehaviourObserver(pairs, count=3, folder=tmp_path / "observations")
    seen = []
    trainer = build(DPOTrainer, tiny_folder, rows.train, config(tmp_path), trainable="lora", callbacks=[observer])
    observer.log = seen.append
    trainer.train()
    assert sorted(observer.observations) == [0, 2, 4]
    final = pair_scores(trainer.model.eval(), pairs)
    np.testing.assert_allclose(observer.observations[4][0], final.chosen, atol=1e-4)
    assert seen[0]["observed_train_rewards/margins/sailing"] == 0.0
    assert seen[2]["observed_test_num_pairs/gardening"] == sum(
        p.split == "test" and p.behaviour == "gardening" for p in pairs
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_continued_from_a_checkpoint_gives_the_same_numbers(tiny_folder, tokenizer, rows, tmp_path):
    pairs = encoded(rows, tokenizer)
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 2}

    def run(folder, *callbacks):
        observer = BehaviourObserver(pairs, count=7, folder=folder / "observations")
        trainer = build(
            PreferenceTrainer,
            tiny_folder,
            rows.train,
            config(folder, **args),
            trainable="lora",
            callbacks=[observer, *callbacks],
        )
        return trainer, observer

    whole, whole_observer = run(tmp_path / "whole")
    whole.train()
    broken, _ = run(tmp_path / "broken", StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again, observer = run(tmp_path / "broken")
    again.train(resume_from_checkpoint=True)
    assert sorted(observer.observations) == sorted(whole_observer.observations) == list(range(7))
    for step, found in observer.observations.items():
        np.testing.assert_allclose(found, whole_observer.observations[step], atol=1e-5)
    history = json.loads((tmp_path / "broken/checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
