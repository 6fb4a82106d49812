"""What-ifs agree with forecasts of the changed runs, in Python and on the command line."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from tests.cli.test_cli import run
from tests.cli.test_twin import command

import foretune
from foretune.cli.what_if import _training_arguments, table
from foretune.errors import UserError
from foretune.records import load_run
from foretune.verbs.what_if import Answer, StoredTwin


@pytest.fixture(scope="module")
def folder(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out, "--relinearise_every", "5")) == 0
    return out


@pytest.fixture(scope="module")
def twin(folder):
    return StoredTwin(folder)


def margins_of_another_forecast(tmp_path, tiny_folder, data, *more):
    assert run("forecast", *command(tiny_folder, data, tmp_path / "other", *more)) == 0
    arrays = load_run(tmp_path / "other").read_arrays("forecast_pairs")
    return dict(zip(arrays["pair_id"].tolist(), arrays["margins"][-1], strict=True))


def test_no_change_is_the_forecast_again(folder, twin):
    stored = load_run(folder).read_arrays("forecast_pairs")
    answer = foretune.what_if(twin, observations=twin.job.ours.observations)
    np.testing.assert_allclose(answer.margins, stored["margins"], atol=1e-6)
    assert all(row["loss_change"] == pytest.approx(0, abs=1e-6) for row in answer.rows)


@pytest.mark.parametrize(
    ("question", "flags"),
    [
        ({"drop": ["sailing"]}, ["--behaviours", "gardening"]),
        ({"learning_rate": 1e-4}, ["--learning_rate", "1e-4"]),
        ({"beta": 0.5, "objective": "hinge"}, ["--beta", "0.5", "--loss_type", "hinge"]),
        ({"data_seed": 9}, ["--data_seed", "9"]),
        ({"num_train_epochs": 1, "max_steps": -1}, ["--num_train_epochs", "1", "--max_steps", "-1"]),
        ({"optim": "sgd", "learning_rate": 0.01}, ["--optim", "sgd", "--learning_rate", "0.01"]),
    ],
    ids=lambda part: "" if isinstance(part, list) else ",".join(part),
)
def test_an_answer_equals_the_forecast_of_the_changed_run(
    question, flags, tiny_folder, persona_file, tmp_path, tmp_path_factory
):
    base = tmp_path / "base"
    assert run("forecast", *command(tiny_folder, persona_file, base)) == 0
    answer = foretune.what_if(base, **question)
    expected = margins_of_another_forecast(tmp_path, tiny_folder, persona_file, *flags)
    found = dict(zip(answer.pair_id.tolist(), answer.margins[-1], strict=True))
    common = sorted(set(found) & set(expected))
    assert len(common) >= 20
    np.testing.assert_allclose([found[i] for i in common], [expected[i] for i in common], atol=2e-4, rtol=1e-3)


def test_weights_and_row_limits_equal_those_of_data(tiny_folder, persona_file, tmp_path):
    base = tmp_path / "base"
    assert run("forecast", *command(tiny_folder, persona_file, base)) == 0
    weighted = tmp_path / "weighted.jsonl"
    rows = [json.loads(line) for line in persona_file.read_text().splitlines()]
    weighted.write_text(
        "".join(json.dumps(row | {"weight": 3 - 2 * (row["behaviour"] == "sailing")}) + "\n" for row in rows)
    )
    answer = foretune.what_if(base, weight={"gardening": 3.0})
    expected = margins_of_another_forecast(tmp_path, tiny_folder, weighted)
    found = dict(zip(answer.pair_id.tolist(), answer.margins[-1], strict=True))
    assert set(found) == set(expected)
    np.testing.assert_allclose([found[i] for i in found], [expected[i] for i in found], atol=2e-4, rtol=1e-3)


def test_flipped_labels_turn_the_run_around(twin):
    base, flipped = foretune.what_if(twin), foretune.what_if(twin, label_noise=1.0)
    assert np.corrcoef(base.margins[-1], flipped.margins[-1])[0, 1] < -0.9
    half = foretune.what_if(twin, label_noise=0.5)
    assert np.abs(half.margins[-1]).mean() < 0.7 * np.abs(base.margins[-1]).mean()


def test_fewer_rows_are_balanced(twin):
    from foretune.verbs.what_if import _rows

    rows = _rows(twin, (), 6)
    answers = twin.pairs["chosen"][rows]
    assert len(rows) == 12 and (answers == " Yes").sum() == 6
    assert foretune.what_if(twin, rows_per_behaviour=6).steps[-1] == 12


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"drop": ["chess"]}, "no behaviour is called 'chess': there are gardening, sailing"),
        ({"drop": ["gardening", "sailing"]}, "no training row is left"),
        ({"weight": {"sailing": -1.0}}, "weights must be 0 or more"),
        ({"rows_per_behaviour": 0}, "at least 1"),
        ({"label_noise": 2.0}, "from 0 to 1"),
        ({"weight": {"sailing": float("inf")}}, "the weight of 'sailing' is inf: it must be a number up to 1e30."),
        ({"weight": {"sailing": float("nan")}}, "the weight of 'sailing' is nan: it must be a number up to 1e30."),
        ({"weight": {"sailing": 1e308}}, r"the weight of 'sailing' is 1e\+308: it must be a number up to 1e30."),
        ({"lora_r": 2}, "cannot change lora_r"),
        ({"learnig_rate": 1e-4}, "unknown argument learnig_rate; did you mean learning_rate"),
        ({"learning_rate": "abc"}, "learning_rate is 'abc': a number is needed."),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs is 0.0: it must be above 0."),
        ({"max_length": 5}, "cannot change max_length"),
        ({"observations": 1}, "observations is 1: it must be at least 2"),
    ],
)
def test_impossible_questions_are_refused(twin, question, said):
    with pytest.raises(UserError, match=said):
        foretune.what_if(twin, **question)


def test_command_line(folder, tmp_path, capsys):
    written = tmp_path / "answer.json"
    flags = ["--weight", "sailing=0.5", "--learning_rate", "1e-4", "--split", "test", "--json", str(written)]
    flags += ["--observations", "3"]
    assert run("what_if", str(folder), *flags) == 0
    shown = capsys.readouterr().out
    assert "gardening" in shown and "(test pairs)" in shown
    answer = json.loads(written.read_text())
    assert {row["split"] for row in answer["rows"]} == {"train", "test"} and len(answer["steps"]) == 3
    assert run("what_if", str(folder), "--weight", "sailing") == 2
    assert "BEHAVIOUR=NUMBER" in capsys.readouterr().err
    assert run("what_if", str(tmp_path)) == 2
    assert run("what_if", str(folder), "--drop", "chess") == 2


def test_the_answer_is_shown_though_it_cannot_be_written(folder, tmp_path, capsys):
    written = tmp_path / "nowhere" / "answer.json"
    assert run("what_if", str(folder), "--learning_rate=1e-4", "--json", str(written)) == 2
    shown = capsys.readouterr()
    assert "gardening" in shown.out and f"cannot write the answer to {written}" in shown.err.replace("\n", "")


def test_training_arguments_are_words_or_have_an_equals_sign():
    words = ["--learning_rate=1e-4", "--beta", "0.3", "--weight_decay", "-1", "--optim_args=a=b"]
    expected = {"learning_rate": "1e-4", "beta": "0.3", "weight_decay": "-1", "optim_args": "a=b"}
    assert _training_arguments(words) == expected
    for wrong in (["--beta"], ["beta", "1"], ["--beta", "--optim", "sgd"], ["--beta="]):
        with pytest.raises(UserError, match="arguments are --name value"):
            _training_arguments(wrong)


def test_names_are_shown_as_they_are():
    figures = {"loss": 0.5, "reward_accuracy": 0.5, "margin": 0.1}
    names = ["[safety] refusals", "[/INST] style"]
    changes = {f"{name}_change": 0.0 for name in figures}
    rows = [{"behaviour": name, "split": "train", **figures, **changes} for name in names]
    answer = Answer(rows, [0, 5], np.zeros((2, 1)), np.zeros(1))
    console = Console(record=True, width=120, file=StringIO())
    console.print(table(answer, split="train"))
    shown = console.export_text()
    assert all(name in shown for name in names)
    with pytest.raises(UserError, match="the forecast measured no test pairs: leave out --split test."):
        table(answer, split="test")


def test_a_forecast_of_the_output_layer_is_refused(tiny_folder, persona_file, tmp_path, capsys):
    from tests.cli.test_cli import command as plain

    assert run("forecast", *plain(tiny_folder, persona_file, tmp_path / "run")) == 0
    assert run("what_if", str(tmp_path / "run")) == 2
    assert "of a run of adapters or all weights" in capsys.readouterr().err
