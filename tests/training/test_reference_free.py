"""Losses without a reference: the run of the output layer that TRL's CPO trainer makes, simulated."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer

from foretune.dynamics.head_problem import head_problem
from foretune.dynamics.simulated_run import simulate_run
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import head_of, untie_head
from foretune.objectives import DPO, simpo
from foretune.scores import Convention, pair_scores

ANSWERS = [" soil", " rain on the roof", " a very long walk", " rope and mast"]


def encoded(row, index):
    """A pair as the trainer tokenised it."""
    responses = [[token for token in row[f"{side}_labels"] if token != -100] for side in ("chosen", "rejected")]
    prompt = row["chosen_input_ids"][: -len(responses[0])]
    assert row["rejected_input_ids"][: -len(responses[1])] == prompt
    return EncodedPair(index, "b", "train", 1.0, prompt, *responses, False)


@pytest.mark.parametrize(
    ("loss_type", "objective", "per_token"),
    [("simpo", simpo(beta=2.0, gamma=0.7), True), ("sigmoid", DPO(beta=2.0), False)],
    ids=["simpo", "sigmoid"],
)
def test_runs_without_a_reference_are_simulated_exactly(
    loss_type, objective, per_token, tiny_folder, tokenizer, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).requires_grad_(False).eval()
    untie_head(model)
    model.get_output_embeddings().weight.requires_grad_(True)
    rows = [
        {"prompt": f"Day {n}:", "chosen": ANSWERS[n % 4], "rejected": f"{ANSWERS[(n + 1 + n // 4) % 4]} {n}"}
        for n in range(12)
    ]
    options = {"cpo_alpha": 0.0, "simpo_gamma": 0.7, "beta": 2.0, "loss_type": loss_type}
    config = CPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **options,
    )
    trainer = CPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    pairs = [encoded(row, index) for index, row in enumerate(trainer.train_dataset)]
    convention = Convention(per_token=per_token, reference=False)
    assert len({(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs}) > 3
    with torch.no_grad():
        states = ForwardPass(model, packed=True).states(pairs)
    head = head_of(model)
    head = head._replace(weight=head.weight.detach().clone())
    simulated = simulate_run(
        head_problem(head, states, pairs, convention=convention),
        trainer.args,
        objective,
        train_pairs=range(len(pairs)),
        weights=np.ones(len(pairs)),
        observed=range(len(pairs)),
        observations=2,
    )
    trainer.train()
    scores = pair_scores(model.eval(), convention.scored(pairs))
    there = (scores.chosen - scores.rejected).numpy()
    assert np.abs(there - simulated.margins[0]).max() > 0.1
    np.testing.assert_allclose(simulated.margins[-1], there, atol=2e-3, rtol=1e-3)
    residual = simulated.margins[-1] - there
    assert 1 - residual.var() / (there - simulated.margins[0]).var() > 0.999
