"""SimPO, CPO, ORPO and KTO trained by TRL on the pairs as foretune encodes them."""

import numpy as np
import pytest
import torch
from tests.cli.test_cli import command, run
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from foretune.data import load_preferences
from foretune.models.encoding import encode
from foretune.objectives import DPO, ORPO, Unpaired, cpo, kto_pair, simpo
from foretune.records import load_run
from foretune.scores import Convention, pair_scores
from foretune.training.method_trainers import METHODS, build_method_trainer

PAIRS = 4


@pytest.fixture(scope="module")
def pairs(persona_file, tokenizer):
    """Pairs whose prompts and responses differ in length."""
    rows = load_preferences(str(persona_file)).train
    found = encode(rows, tokenizer, split="train", max_length=None)
    return [pair._replace(chosen_ids=pair.chosen_ids * (1 + index % 3)) for index, pair in enumerate(found)]


def built(method, pairs, tiny_folder, tokenizer, folder, **options):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    arguments = DPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=PAIRS, max_steps=2, **options
    )
    return build_method_trainer(method, model, arguments, tokenizer, train=pairs)


def first_loss(trainer, count):
    """Of the first rows, after a change of the model that the reference does not share."""
    trainer.get_train_dataloader()  # references are taken by now
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(count)])
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def scores(trainer, pairs, *, per_token=False):
    found = pair_scores(trainer.model.eval(), Convention(per_token=per_token).scored(pairs))
    return found.chosen.numpy(), found.rejected.numpy()


def likelihood(trainer, pairs):
    """Mean of −log π over all tokens of the chosen responses."""
    return -scores(trainer, pairs)[0].sum() / sum(len(pair.chosen_ids) for pair in pairs)


def test_simpo_trains_on_our_objective(pairs, tiny_folder, tokenizer, tmp_path):
    trainer = built("simpo", pairs, tiny_folder, tokenizer, tmp_path, beta=2.0)
    loss = first_loss(trainer, PAIRS)
    chosen, rejected = scores(trainer, pairs[:PAIRS], per_token=True)
    assert loss == pytest.approx(simpo(beta=2.0).value(chosen - rejected).mean(), rel=1e-5)


def test_cpo_trains_on_our_objective_with_the_likelihood_pooled_over_the_batch(pairs, tiny_folder, tokenizer, tmp_path):
    trainer = built("cpo", pairs, tiny_folder, tokenizer, tmp_path, beta=0.3)
    loss = first_loss(trainer, PAIRS)
    preference = cpo(base=DPO(beta=0.3), alpha=0.0).value(*scores(trainer, pairs[:PAIRS])).mean()
    assert loss == pytest.approx(preference + likelihood(trainer, pairs[:PAIRS]), rel=1e-5)


def test_orpo_trains_on_our_objective_with_the_likelihood_of_whole_sequences(pairs, tiny_folder, tokenizer, tmp_path):
    trainer = built("orpo", pairs, tiny_folder, tokenizer, tmp_path, beta=0.3)
    loss = first_loss(trainer, PAIRS)
    odds = ORPO(strength=0.3, likelihood=0.0).value(*scores(trainer, pairs[:PAIRS], per_token=True)).mean()
    whole = [
        pair._replace(prompt_ids=pair.prompt_ids[:1], chosen_ids=pair.prompt_ids[1:] + pair.chosen_ids)
        for pair in pairs[:PAIRS]
    ]
    assert loss == pytest.approx(odds + likelihood(trainer, whole), rel=1e-5)


def test_kto_trains_on_our_objective_on_twice_as_many_rows(pairs, tiny_folder, tokenizer, tmp_path):
    trainer = built("kto", pairs, tiny_folder, tokenizer, tmp_path, beta=0.3)
    before = scores(trainer, pairs)
    loss = first_loss(trainer, 2 * PAIRS)
    assert trainer.args.per_device_train_batch_size == 2 * PAIRS
    change = np.stack(scores(trainer, pairs)) - np.stack(before)
    rows = trainer.train_dataset[: 2 * PAIRS]
    place = {
        (*pair.prompt_ids, 0, *answer): (side, index)
        for index, pair in enumerate(pairs)
        for side, answer in ((0, pair.chosen_ids), (1, pair.rejected_ids))
    }
    ratios = np.array(
        [
            change[place[(*prompt, 0, *answer)]]
            for prompt, answer in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        ]
    )
    kl = trainer._metrics["eval"]["kl"][-1]
    desirable = np.array(rows["label"])
    assert len(set(desirable)) == 2
    expected = Unpaired(kto_pair(beta=0.3, reference_point=kl)).value(ratios, desirable).mean()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert len(trainer.train_dataset) == 2 * len(pairs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_observed(method, tiny_folder, persona_file, tmp_path):
    arguments = command(tiny_folder, persona_file, tmp_path, "--method", method, "--max_steps", "4")
    assert run("train", *arguments) == 0
    rows = load_run(tmp_path).read_table("observed").to_pylist()
    last = max(row["step"] for row in rows)
    assert last == 4
    assert all(abs(row["margin"]) > 1e-3 for row in rows if row["step"] == last)
    assert run("train", *arguments) == 0  # nothing is left to do


@pytest.mark.parametrize("trainable", ["unembedding", "lora"])
def test_the_forecast_of_simpo_is_right(trainable, tiny_folder, persona_file, tmp_path):
    more = ("--use_peft", "True", "--learning_rate", "0.0005", "--band_runs", "2") if trainable == "lora" else ()
    flags = ("--method", "simpo", "--beta", "2.0", "--trainable", trainable, *more)
    for verb in ("forecast", "train"):
        assert run(verb, *command(tiny_folder, persona_file, tmp_path, *flags)) == 0
    assert run("verify", "--output_dir", str(tmp_path)) == 0
    found = load_run(tmp_path).read_json("verification.json")
    assert found["margin_r2"] > (0.999 if trainable == "unembedding" else 0.9)
    assert found["margin_slope"] == pytest.approx(1, abs=0.01 if trainable == "unembedding" else 0.3)
    forecast, observed = (load_run(tmp_path).read_table(name).to_pylist() for name in ("forecast", "observed"))
    starts = [
        {(row["behaviour"], row["split"]): row["loss"] for row in rows if row["step"] == 0}
        for rows in ([row for row in forecast if row["trained_on"] == "mixture"], observed)
    ]
    assert starts[0] == pytest.approx(starts[1], rel=1e-4)


def test_methods_without_row_weights_or_with_options_of_dpo_are_refused(tiny_folder, persona_file, tmp_path, capsys):
    assert run("train", *command(tiny_folder, persona_file, tmp_path, "--method", "orpo", "--loss_type", "ipo")) == 2
    assert "loss_type is an option of DPOTrainer alone" in capsys.readouterr().err
    assert run("forecast", *command(tiny_folder, persona_file, tmp_path, "--method", "orpo")) == 2
    assert "its likelihood term is taken over the prompt" in capsys.readouterr().err
    weighted = tmp_path / "weighted.jsonl"
    lines = persona_file.read_text().splitlines()
    weighted.write_text(
        "\n".join(line[:-1] + f', "weight": {1 + number % 2}}}' for number, line in enumerate(lines)) + "\n"
    )
    assert run("train", *command(tiny_folder, weighted, tmp_path / "run", "--method", "kto")) == 2
    assert "method kto has no row weights" in capsys.readouterr().err
