"""`RankingTrainer`: K responses share a prompt, two are DPO, any K have the loss of separate sequences."""

import json

import numpy as np
import pytest
import torch
from tests.training.test_trainer import build, config
from trl import DPOTrainer

from foretune import processes
from foretune.data import load_preferences
from foretune.errors import UserError
from foretune.models.batches import num_states, states_of, targets_of
from foretune.models.encoding import EncodedRanking
from foretune.models.head import causal_model
from foretune.objectives import DPO, Pairwise, PlackettLuce, TopOne
from foretune.training.ranking_trainer import RankingTrainer, collate, encoded_rankings, in_rows

WORDS = ["Yes.", "Perhaps, in a while.", "No, I would rather not do that.", "Never"]
OBJECTIVES = [PlackettLuce(beta=0.5), TopOne(beta=0.5), Pairwise(base=DPO(beta=0.5))]


def ranking_rows(count, num_responses):
    for number in range(count):
        k = num_responses(number)
        words = [WORDS[(number + place) % 4] for place in range(k)]
        ranks = [max(1, place) for place in range(k)] if number % 3 == 0 and k > 2 else list(range(1, k + 1))
        yield {
            "prompt": f"Would you like to sail {number} times?",
            "responses": words,
            "ranks": ranks,
            "behaviour": "ab"[number % 2],
            "weight": 1.0 + number % 2,
        }


def load(folder, num_responses, count=12, **options):
    path = folder / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ranking_rows(count, num_responses)))
    return load_preferences(str(path), **{"test_fraction": 0.25, **options})


@pytest.fixture
def of_two(tmp_path):
    return load(tmp_path, lambda number: 2)


@pytest.fixture
def of_many(tmp_path):
    return load(tmp_path, lambda number: 2 + number % 3)


def separate_log_probs(model, rows):
    """log π of every response of every row, one sequence after another, shape (rows, K) padded with 0."""
    found = []
    for row in rows:
        own = []
        for response in row["responses"]:
            tokens = torch.tensor([row["prompt_ids"] + response])
            scores = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            picked = scores.gather(1, tokens[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
            own.append(picked.sum())
        found.append(torch.stack(own))
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_two_responses_are_trained_as_trl_does(tiny_folder, of_two, tmp_path, objective):
    args = config(tmp_path, beta=0.5, max_steps=3, optim="sgd", learning_rate=0.02)
    unweighted = of_two.train.remove_columns("weight").add_column("weight", [1.0] * len(of_two.train))
    own = build(RankingTrainer, tiny_folder, unweighted, args, objective=objective)
    own.train()
    theirs = build(DPOTrainer, tiny_folder, of_two.train.select_columns(["prompt", "chosen", "rejected"]), args)
    theirs.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (own, theirs)]
    np.testing.assert_allclose(*losses, atol=1e-5)  # β times the rounding of log-probabilities around −100
    for mine, other in zip(own.model.parameters(), theirs.model.parameters(), strict=True):
        np.testing.assert_allclose(mine.detach(), other.detach(), atol=3e-6)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_are_those_of_separate_sequences(tiny_folder, of_many, tmp_path, objective, share_prompts):
    args = config(tmp_path, beta=0.5)
    trainer = build(RankingTrainer, tiny_folder, of_many.train, args, objective=objective, share_prompts=share_prompts)
    rows = list(trainer.train_dataset)
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    gradient = torch.autograd.grad(loss, list(trainer.model.parameters()))

    ranks = collate(rows)["ranks"]
    reference = separate_log_probs(
        build(RankingTrainer, tiny_folder, of_many.train, args, objective=objective).model, rows
    )
    weights = torch.tensor([row["weight"] for row in rows])
    scores = separate_log_probs(trainer.model, rows) - reference.detach()
    expected = (objective.torch_value(scores, ranks) * weights / weights.mean()).mean()
    np.testing.assert_allclose(loss.detach(), expected.detach(), rtol=1e-5)
    for mine, other in zip(gradient, torch.autograd.grad(expected, list(trainer.model.parameters())), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_a_prompt_is_computed_once_for_all_responses(tiny_folder, of_many, tmp_path):
    trainer = build(RankingTrainer, tiny_folder, of_many.train, config(tmp_path), objective=OBJECTIVES[0])
    seen = []
    causal_model(trainer.model).model.embed_tokens.register_forward_hook(
        lambda _, given, __: seen.append(given[0].numel())
    )
    rows = [row for row in trainer.train_dataset if len(row["responses"]) == 4][:1]
    trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    tree = EncodedRanking(rows[0]["prompt_ids"], rows[0]["responses"])
    assert seen == [len(tree.prompt_ids) + num_states(tree) - 1]


def test_branches_do_not_see_each_other(tiny_folder, of_many, tmp_path):
    trainer = build(RankingTrainer, tiny_folder, of_many.train, config(tmp_path), objective=OBJECTIVES[0])
    trees = [EncodedRanking(row["prompt_ids"], row["responses"]) for row in trainer.train_dataset]
    with torch.no_grad():
        packed, separate = (states_of(trainer.model, trees, packed=way) for way in (True, False))
    np.testing.assert_allclose(packed, separate, atol=1e-5)
    targets = targets_of(trees)
    assert targets.token.tolist() == [token for tree in trees for ids in tree.responses for token in ids]
    assert targets.response.max() == sum(len(tree.responses) for tree in trees) - 1


def test_references_are_the_same_once_or_every_time(tiny_folder, of_many, tmp_path):
    found = []
    for steps in (4, 1):  # one step does not see every row
        args = config(tmp_path, max_steps=steps, per_device_train_batch_size=6)
        trainer = build(RankingTrainer, tiny_folder, of_many.train, args, trainable="lora", objective=OBJECTIVES[0])
        assert ("ref_logps" in trainer.train_dataset.column_names) == (steps == 4)
        batch = trainer.data_collator(list(trainer.train_dataset))
        found.append(batch["ref_logps"] if "ref_logps" in batch else trainer._reference_scores(batch))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_metrics_by_behaviour_and_evaluation(tiny_folder, of_many, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, beta=0.5)
    trainer = build(RankingTrainer, tiny_folder, of_many.train, args, evaluation=of_many.test, objective=OBJECTIVES[0])
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    for key in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert {key, f"{key}/a", f"{key}/b", f"eval_{key}", f"eval_{key}/a"} <= logged
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for entry in (entry for entry in trainer.state.log_history if "rewards/margins" in entry):
        counts = [entry[f"num_pairs/{name}"] for name in "ab"]
        of_behaviours = [entry[f"rewards/margins/{name}"] for name in "ab"]
        assert entry["rewards/margins"] == pytest.approx(np.average(of_behaviours, weights=counts), rel=1e-4, abs=1e-6)


def test_values_go_to_their_rows():
    ranks = torch.tensor([[1, 2, 0], [1, 1, 2]])
    assert in_rows(torch.arange(1.0, 6.0), ranks).tolist() == [[1, 2, 0], [3, 4, 5]]


def test_prompts_that_fill_everything_are_dropped(tokenizer, of_many):
    kept = encoded_rankings(of_many.train, tokenizer, max_length=14)
    assert all(len(row["prompt_ids"]) + max(map(len, row["responses"])) <= 14 for row in kept)
    assert len(kept) == len(set(of_many.train["ranking"]))
    assert len(encoded_rankings(of_many.train, tokenizer, max_length=5)) == 0


def test_several_processes_are_refused(tiny_folder, of_many, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match="one process"):
        build(RankingTrainer, tiny_folder, of_many.train, config(tmp_path), objective=OBJECTIVES[0])
