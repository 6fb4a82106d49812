"""Rankings through the command line: forecasts that group contrasts as training does, and what is refused."""

import json

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.training.test_rankings import WORDS, ranking_rows

import foretune
from foretune.data import load_preferences
from foretune.errors import UserError
from foretune.records import load_run
from foretune.training.ranking_trainer import RankingTrainer
from foretune.verbs.job import parse_job

LOSSES = ("plackett_luce", "pairwise", "top1")


def command(folder, data, out, *more):
    return [
        *("--model_name_or_path", str(folder), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--max_steps", "9", "--per_device_train_batch_size", "4", "--draws", "50"),
        *(
            "--learning_rate",
            "0.01",
            "--observations",
            "4",
            "--disable_tqdm",
            "True",
            "--band_runs",
            "2",
            "--forecast_alone",
            "False",
            *more,
        ),
    ]


def both(arguments):
    job = parse_job(arguments, prog="test")
    foretune.forecast(job)
    foretune.train(job)


def margins_of(folder):
    return [load_run(folder).read_arrays(name)["margins"] for name in ("forecast_pairs", "observed_pairs")]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_output_layer_is_forecast_exactly(tiny_folder, rankings_file, tmp_path, loss):
    arguments = command(tiny_folder, rankings_file, tmp_path, "--ranking_loss", loss, "--trainable", "unembedding")
    if loss == "plackett_luce":
        assert run("forecast", *arguments) == 0
        assert run("train", "--output_dir", str(tmp_path)) == 0
        assert run("verify", "--output_dir", str(tmp_path)) == 0
    else:
        both(arguments)
    forecast, observed = margins_of(tmp_path)
    assert np.abs(observed[-1]).max() > 1
    np.testing.assert_allclose(forecast, observed, atol=2e-4 * np.abs(observed).max())
    tables = [load_run(tmp_path).read_table(name).to_pylist() for name in ("forecast", "observed")]
    joint = [row for row in tables[0] if (row["method"], row["trained_on"]) == ("simulated_run", "mixture")]
    for said, seen in zip(joint, tables[1], strict=True):
        assert (said["behaviour"], said["split"], said["step"]) == (seen["behaviour"], seen["split"], seen["step"])
        assert said["loss"] == pytest.approx(seen["loss"], rel=1e-3)
    assert {row["method"] for row in tables[0]} == {"simulated_run"}  # no flow: it knows pairs alone
    behaviours = load_run(tmp_path).read_table("behaviours").to_pylist()
    assert sum(row["num_pairs"] for row in behaviours) == 30
    assert load_run(tmp_path).record["forecast"]["objective"].startswith(loss)


def test_adapters_are_forecast_from_some_rankings(tiny_folder, rankings_file, tmp_path):
    lora = ("--use_peft", "True", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_dropout", "0")
    more = (*lora, "--ranking_loss", "plackett_luce", "--factor_rank", "32", "--seed", "5")
    arguments = command(tiny_folder, rankings_file, tmp_path, *more)
    arguments[arguments.index("--learning_rate") + 1] = "0.0003"
    both([*arguments, "--relinearise_every", "1"])
    forecast, observed = margins_of(tmp_path)
    assert np.corrcoef(forecast[-1], observed[-1])[0, 1] > 0.999
    few = command(tiny_folder, rankings_file, tmp_path / "few", *more, "--twin_pairs", "6", "--observe_pairs", "6")
    foretune.forecast(parse_job(few, prog="test"))
    assert load_run(tmp_path / "few").read_arrays("forecast_pairs")["margins"].shape[1] < observed.shape[1]


def test_two_responses_are_the_run_of_pairs(tiny_folder, tmp_path):
    rows = list(ranking_rows(16, lambda number: 2))
    pairs = [{**row, "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in rows]
    for row in pairs:
        del row["responses"], row["ranks"]
    for row in rows:
        row["ranks"] = [1, 2]
    found = []
    for name, content, more in (("rankings", rows, ["--ranking_loss", "plackett_luce"]), ("pairs", pairs, [])):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        arguments = command(tiny_folder, data, tmp_path / name, *more, "--trainable", "full", "--test_fraction", "0")
        foretune.train(parse_job(arguments, prog="test"))
        folder = load_run(tmp_path / name)
        texts = {row["pair_id"]: row["prompt"] for row in folder.read_table("pairs").to_pylist()}
        arrays = folder.read_arrays("observed_pairs")
        order = np.argsort([texts[int(pair)] for pair in arrays["pair_id"]])
        rates = folder.record["audit"]["initial_rates"]
        found.append((arrays["margins"][:, order], rates))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "the data are rankings: audit, forecast and train take them with --ranking_loss"),
        (["--ranking_loss", "listwise"], "invalid choice"),
        (["--ranking_loss", "top1", "--loss_type", "hinge"], "top1 is a loss of its own"),
        (["--ranking_loss", "pairwise", "--loss_type", "ipo"], "no loss of one summed margin"),
        (["--ranking_loss", "pairwise", "--ld_alpha", "0.5"], "ld_alpha is not defined for rankings"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_folder, rankings_file, tmp_path, capsys, more, told):
    assert run("forecast", *command(tiny_folder, rankings_file, tmp_path, *more)) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "more"), [("train", ["--ranking_loss", "top1"]), ("compare", ["--methods", "dpo,top1"])]
)
def test_a_ranking_loss_says_what_it_needs(tiny_folder, persona_file, tmp_path, capsys, verb, more):
    assert run(verb, *command(tiny_folder, persona_file, tmp_path, *more)) == 2
    assert "ranking_loss top1 needs rankings, rows of prompt and responses" in capsys.readouterr().err


def test_verbs_of_pairs_refuse_rankings(tiny_folder, rankings_file, tmp_path, capsys):
    more = ("--ranking_loss", "pairwise", "--trainable", "full")
    foretune.forecast(parse_job(command(tiny_folder, rankings_file, tmp_path, *more), prog="test"))
    assert run("what_if", str(tmp_path), "--drop", "a") == 2
    assert "is of rankings: what-ifs are computed for pairs" in capsys.readouterr().err
    reward = ["--model_name_or_path", str(tiny_folder), "--dataset_name", str(rankings_file)]
    assert run("reward", *reward, "--output_dir", str(tmp_path / "reward")) == 2
    assert "other verbs take pairs" in capsys.readouterr().err


def test_a_ranking_that_nothing_stands_for_is_told(tiny_folder, tmp_path, capsys):
    rows = [{"prompt": f"p{n}", "responses": WORDS[: 3 if n == 0 else 2]} for n in range(12)]
    data = tmp_path / "rare.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--ranking_loss", "pairwise", "--trainable", "full", "--twin_pairs", "1", "--observe_pairs", "1")
    codes = set()
    for seed in range(3):
        arguments = command(tiny_folder, data, tmp_path / str(seed), *more, "--test_fraction", "0")
        codes.add(run("forecast", *arguments, "--seed", str(seed)))
    assert 2 in codes and "none was measured: raise --twin_pairs" in capsys.readouterr().err


def test_forecast_of_a_trainer_takes_pairs(tiny_folder, rankings_file, tmp_path):
    from tests.training.test_trainer import build, config

    from foretune.objectives import TopOne

    rows = load_preferences(str(rankings_file)).train
    trainer = build(RankingTrainer, tiny_folder, rows, config(tmp_path), objective=TopOne())
    with pytest.raises(UserError, match=r"forecast\(trainer\) takes pairs"):
        foretune.forecast(trainer)
