"""Losses of both scores through the command line: the chosen scores are followed besides the margins."""

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.cli.test_rankings import both, command

import foretune
from foretune.errors import UserError
from foretune.records import load_run
from foretune.verbs.job import parse_job

LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
LORA = ("--use_peft", "True", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_dropout", "0")


def curves_of(folder):
    """Forecast and observed curves of the joint run, by behaviour, split and step."""
    tables = [load_run(folder).read_table(name).to_pylist() for name in ("forecast", "observed")]
    joint = [row for row in tables[0] if (row["method"], row["trained_on"]) == ("simulated_run", "mixture")]
    return [{(row["behaviour"], row["split"], row["step"]): row for row in rows} for rows in (joint, tables[1])]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_output_layer_is_forecast_exactly(tiny_folder, unequal_file, tmp_path, loss):
    more = ("--loss_type", loss, "--trainable", "unembedding", "--learning_rate", "0.003")
    arguments = command(tiny_folder, unequal_file, tmp_path, *more)
    if loss == "nca_pair":
        assert run("forecast", *arguments) == 0
        assert run("train", "--output_dir", str(tmp_path)) == 0
        assert run("verify", "--output_dir", str(tmp_path)) == 0
    else:
        both(arguments)
    said, seen = curves_of(tmp_path)
    assert said.keys() == seen.keys()
    for name in ("loss", "margin", "chosen_displacement", "rejected_displacement"):
        values = np.array([[rows[key][name] for key in seen] for rows in (said, seen)])
        assert np.ptp(values[1]) > 1e-3
        np.testing.assert_allclose(values[0], values[1], atol=1e-3 * np.ptp(values[1]))


@pytest.mark.parametrize(
    "more",
    [("--factor_rank", "32"), ("--twin", "tangent")],
    ids=["weight space", "tangent"],
)
def test_other_weights_are_forecast(tiny_folder, unequal_file, tmp_path, more):
    flags = ("--loss_type", "nca_pair", "--relinearise_every", "1", "--learning_rate", "0.0003", *LORA, *more)
    both(command(tiny_folder, unequal_file, tmp_path, *flags))
    said, seen = curves_of(tmp_path)
    for name in ("margin", "chosen_displacement"):
        values = np.array([[rows[key][name] for key in seen] for rows in (said, seen)])
        np.testing.assert_allclose(values[0], values[1], atol=0.03 * np.abs(values[1]).max())


def test_all_weights_are_forecast_from_some_coordinates(tiny_folder, unequal_file, tmp_path):
    more = ("--trainable", "full", "--twin_coordinates", "20000", "--loss_type", "apo_zero")
    arguments = command(tiny_folder, unequal_file, tmp_path, *more)
    arguments[arguments.index("--learning_rate") + 1] = "0.0003"
    both(arguments)
    said, seen = curves_of(tmp_path)
    for name in ("margin", "chosen_displacement"):
        values = np.array([[rows[key][name] for key in seen] for rows in (said, seen)])
        assert np.corrcoef(values)[0, 1] > 0.95


def test_kto_is_forecast_in_its_own_order_of_single_responses(tiny_folder, unequal_file, tmp_path):
    more = ("--method", "kto", "--trainable", "unembedding")
    arguments = command(tiny_folder, unequal_file, tmp_path, *more)
    arguments[arguments.index("--learning_rate") + 1] = "0.001"
    both(arguments)
    said, seen = curves_of(tmp_path)
    for name in ("margin", "chosen_displacement", "rejected_displacement"):
        values = np.array([[rows[key][name] for key in seen] for rows in (said, seen)])
        np.testing.assert_allclose(values[0], values[1], atol=0.02 * np.abs(values[1]).max())
    notes = load_run(tmp_path).record["forecast"]["notes"]
    assert any("KL divergence" in note for note in notes)


def test_a_pilot_is_gone_on_from(tiny_folder, unequal_file, tmp_path):
    flags = ("--loss_type", "apo_down", "--learning_rate", "0.0003", "--pilot_fraction", "0.5", *LORA)
    both(command(tiny_folder, unequal_file, tmp_path, *flags, "--relinearise_every", "1", "--factor_rank", "32"))
    said, seen = curves_of(tmp_path)
    for key, row in seen.items():
        close = 1e-6 if key[2] <= 3 else 0.05 * abs(row["chosen_displacement"]) + 1e-3
        assert said[key]["chosen_displacement"] == pytest.approx(row["chosen_displacement"], abs=close)


def test_displacement_is_forecast_with_a_loss_of_the_margin(tiny_folder, unequal_file, tmp_path):
    more = ("--trainable", "unembedding", "--forecast_displacement", "True")
    arguments = command(tiny_folder, unequal_file, tmp_path / "dpo", *more)
    arguments[arguments.index("--learning_rate") + 1] = "0.003"
    both(arguments)
    said, seen = curves_of(tmp_path / "dpo")
    for name in ("loss", "margin", "chosen_displacement", "rejected_displacement"):
        values = np.array([[rows[key][name] for key in seen] for rows in (said, seen)])
        np.testing.assert_allclose(values[0], values[1], atol=1e-3 * np.ptp(values[1]))
    refused = command(tiny_folder, unequal_file, tmp_path / "ipo", *more, "--loss_type", "ipo")
    assert run("forecast", *refused) == 2


@pytest.fixture(scope="module")
def sided(tiny_folder, unequal_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sided"
    foretune.forecast(parse_job(command(tiny_folder, unequal_file, out, "--loss_type", "bco_pair", *LORA), prog="test"))
    return out


def test_a_what_if_of_another_sided_loss_equals_its_forecast(sided, tiny_folder, unequal_file, tmp_path):
    again = foretune.what_if(sided)
    base = load_run(sided).read_arrays("forecast_pairs")
    np.testing.assert_allclose(again.margins[-1], base["margins"][-1], atol=1e-4)
    assert all(abs(row["loss_change"]) < 1e-5 for row in again.rows)
    answer = foretune.what_if(sided, objective="nca_pair")
    arguments = command(tiny_folder, unequal_file, tmp_path, "--loss_type", "nca_pair", *LORA)
    foretune.forecast(parse_job(arguments, prog="test"))
    expected = load_run(tmp_path).read_arrays("forecast_pairs")
    np.testing.assert_allclose(answer.margins[-1], expected["margins"][-1], atol=2e-4)


def test_a_what_if_of_the_margin_with_stand_ins_knows_both_scores(tiny_folder, unequal_file, tmp_path):
    few = ("--loss_type", "nca_pair", *LORA, "--twin_pairs", "6", "--observe_pairs", "4")
    foretune.forecast(parse_job(command(tiny_folder, unequal_file, tmp_path, *few), prog="test"))
    answers = [foretune.what_if(tmp_path, objective=name) for name in ("sigmoid", "hinge", "nca_pair")]
    assert all(np.isfinite(answer.margins).all() and np.ptp(answer.margins) > 0 for answer in answers)


def test_flipped_labels_exchange_both_scores(sided):
    """At first order in a small step, a loss with all labels flipped moves margins the other way."""
    small = {"learning_rate": 1e-6, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
    right = foretune.what_if(sided, objective="sigmoid", **small).margins[-1]
    flipped = foretune.what_if(sided, objective="sigmoid", label_noise=1.0, **small).margins[-1]
    np.testing.assert_allclose(flipped, -right, atol=1e-3 * np.abs(right).max() + 1e-9)
    # bco's two terms are alike but for their sides, so that at the start it is twice DPO
    twice = foretune.what_if(sided, objective="bco_pair", label_noise=1.0, **small).margins[-1]
    np.testing.assert_allclose(twice, flipped, atol=2e-3 * np.abs(right).max() + 1e-9)


def test_a_forecast_of_margins_does_not_know_both_sides(tiny_folder, unequal_file, tmp_path):
    foretune.forecast(parse_job(command(tiny_folder, unequal_file, tmp_path, *LORA), prog="test"))
    with pytest.raises(UserError, match="followed their difference alone: make another forecast"):
        foretune.what_if(tmp_path, objective="apo_zero")
