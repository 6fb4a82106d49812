"""Forecasts of LoRA runs through the command line: from the start, from a pilot, with features taken anew."""

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student
from tests.cli.test_cli import run
from tests.conftest import random_llama
from tests.reference.pair_gradients import log_prob

import foretune
from foretune.dynamics import anchors
from foretune.dynamics.confidence import LIKELY_ERRORS
from foretune.features import token_factors
from foretune.features.token_factors import adapted_layers
from foretune.records import load_run
from foretune.verbs.job import job_from
from foretune.verbs.prepare import prepare
from foretune.verbs.twin import Lineariser, drawn_anew, measured_pairs, trained_model
from foretune.verbs.what_if import StoredTwin


def command(folder, data, out, *more):
    return [
        *("--model_name_or_path", str(folder), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--max_steps", "12", "--per_device_train_batch_size", "8", "--draws", "50"),
        *(
            "--use_peft",
            "True",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
            "--lora_r",
            "4",
            "--lora_dropout",
            "0",
            "--seed",
            "5",
        ),
        *("--learning_rate", "0.0003", "--factor_rank", "32", "--observations", "5", "--disable_tqdm", "True", *more),
    ]


@pytest.fixture(scope="module")
def trained(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("train", *command(tiny_folder, persona_file, out)) == 0
    return out


def verified(trained, folder, *more):
    """The figures of a forecast with these flags beside the training that is there."""
    shutil.copytree(trained, folder)
    assert run("forecast", "--output_dir", str(folder), *more) == 0
    assert run("verify", "--output_dir", str(folder)) == 0
    return load_run(folder).read_json("verification.json")


def test_a_short_run_is_forecast_from_its_start(trained, tmp_path):
    found = verified(trained, tmp_path / "run")
    assert found["margin_r2"] > 0.98
    assert found["margin_slope"] == pytest.approx(1, abs=0.15)


def test_a_forecast_as_dear_as_its_run_says_so_before_it_begins(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert run("forecast", "--output_dir", str(tmp_path / "run"), "--relinearise_every", "3") == 0
    said = capsys.readouterr().err
    assert said.count("answers about as soon") == 1
    assert said.index("answers about as soon") < said.index("the joint run")
    found = load_run(tmp_path / "run").record["forecast"]
    table = load_run(tmp_path / "run").read_table("pairs", ["behaviour", "split"]).to_pylist()
    assert found["cost"] == pytest.approx(4 * len(table) / (12 * 8))  # every pair is measured, in four passes
    assert any(f"at least {found['cost']:.0%} as many rows" in note for note in found["notes"])


def test_features_taken_anew_after_every_step_follow_the_run(trained, tmp_path):
    once, anew = (verified(trained, tmp_path / every, "--relinearise_every", every) for every in ("0", "1"))
    assert anew["margin_r2"] > 0.9995 > once["margin_r2"]
    assert anew["margin_slope"] == pytest.approx(1, abs=0.02)


def test_a_pilot_is_the_beginning_of_the_run_and_of_the_forecast(trained, tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out, "--pilot_fraction", "0.5")) == 0
    folder = load_run(out)
    assert folder.record["forecast"]["pilot_steps"] == 6
    assert run("train", "--output_dir", str(out)) == 0
    observed, alone = (load_run(path).read_arrays("observed_pairs") for path in (out, trained))
    np.testing.assert_allclose(observed["margins"], alone["margins"], atol=1e-5)
    said = folder.read_arrays("forecast_pairs")
    assert said["steps"].tolist() == observed["steps"].tolist()
    before = said["steps"] < 6
    np.testing.assert_allclose(said["margins"][before], observed["margins"][before], atol=1e-5)
    assert run("verify", "--output_dir", str(out)) == 0
    found = folder.read_json("verification.json")
    assert [row["step"] for row in found["over_run"]] == [9, 12]
    assert found["margin_r2"] > 0.99


def test_the_rest_is_forecast_anew_while_it_trains(trained, tiny_folder, persona_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out)) == 0
    before = load_run(out).read_arrays("forecast_pairs")
    capsys.readouterr()
    assert run("train", "--output_dir", str(out), "--forecast_at", "0.5", "0.25") == 0
    assert "answers about as soon" not in capsys.readouterr().err  # it trains already
    assert run("train", "--output_dir", str(out)) == 0  # the same run: nothing is left to do
    assert run("verify", "--output_dir", str(out)) == 0
    folder = load_run(out)
    observed, alone = (load_run(path).read_arrays("observed_pairs") for path in (out, trained))
    np.testing.assert_allclose(observed["margins"], alone["margins"], atol=1e-5)
    np.testing.assert_array_equal(before["margins"], folder.read_arrays("forecast_pairs")["margins"])
    assert [entry["step"] for entry in folder.record["revisions"]] == [3, 6]
    found = folder.read_json("verification.json")
    assert [entry["step"] for entry in found["revisions"]] == [3, 6]
    assert found["revisions"][1]["loss_mae"] < found["revisions"][0]["loss_mae"] < 1e-2
    assert not (out / "revisions").exists()
    assert "forecast made after step 6" in (out / "report.html").read_text()


@pytest.mark.parametrize("flags", [("--forecast_at", "1.5"), ("--forecast_at", "0.5", "--trainable", "unembedding")])
def test_shares_that_cannot_be_forecast_at_are_refused(tiny_folder, persona_file, tmp_path, capsys, flags):
    assert run("train", *command(tiny_folder, persona_file, tmp_path / "run", *flags)) == 2
    assert "forecast_at" in capsys.readouterr().err


def test_bands_hold_runs_with_other_batch_orders(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out, "--band_runs", "6")) == 0
    rows = load_run(out).read_table("forecast").to_pylist()
    assert all(row["loss_low"] <= row["loss"] <= row["loss_high"] for row in rows)
    ends = {row["behaviour"]: row for row in rows if row["split"] == "train" and row["step"] == 12}
    assert ends["all"]["loss_high"] > ends["all"]["loss_low"]
    inside = 0
    for seed in range(20, 30):
        answer = foretune.what_if(out, data_seed=seed)
        found = {row["behaviour"]: row["loss"] for row in answer.rows if row["split"] == "train"}
        inside += sum(ends[name]["loss_low"] <= found[name] <= ends[name]["loss_high"] for name in ends)
    assert inside >= 24  # 27 of 30 expected


def test_bands_are_of_adapters_that_other_seeds_draw(tiny_folder, persona_file, tmp_path, monkeypatch):
    flags = ("--per_device_train_batch_size", "48", "--test_fraction", "0", "--learning_rate", "0.003")  # whole batches
    flags += ("--twin_pairs", "50", "--observe_pairs", "50", "--relinearise_every", "0")

    def losses(name, *more):
        folder = tmp_path / name
        assert run("forecast", *command(tiny_folder, persona_file, folder, *flags, *more)) == 0
        rows = load_run(folder).read_table("forecast").to_pylist()
        return {row["behaviour"]: row for row in rows if row["step"] == 12}

    ours, others = losses("ours", "--band_runs", "6"), {}
    for seed in (6, 7):
        others[seed] = losses(str(seed), "--band_runs", "0", "--seed", str(seed))
    starts = {seed: StoredTwin(load_run(tmp_path / str(seed))).anchors.get(0).start() for seed in others}
    assert all(row["loss_high"] - row["loss_low"] > 0.01 for row in ours.values())
    monkeypatch.setattr(Lineariser, "drawn_anew", lambda self, seed: starts[seed])
    for name, row in losses("known", "--band_runs", "2").items():
        spread = np.std([own[name]["loss"] for own in others.values()], ddof=1)
        width = student.ppf(0.95, 1) * np.sqrt(1.5)
        assert row["loss_high"] - row["loss"] == pytest.approx(width * spread, rel=1e-3)


@pytest.mark.parametrize("how", [True, "gaussian", "orthogonal"])
def test_adapters_are_drawn_as_peft_draws_them(how):
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=how)
    model = get_peft_model(random_llama(50, hidden_size=64), config)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    drawn = drawn_anew(model, adapted_layers(model), 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(drawn) == (0 if how == "orthogonal" else 4)
    for name, value in drawn.items():
        own = model.get_parameter(name)
        assert value.std() == pytest.approx(float(own.std()), rel=0.15) and not torch.equal(value, own)
    again, other = (drawn_anew(model, adapted_layers(model), seed) for seed in (3, 4))
    assert all(torch.equal(again[name], value) and not torch.equal(other[name], value) for name, value in drawn.items())


def test_few_measured_pairs_stand_for_the_rest(trained, tmp_path):
    found = verified(trained, tmp_path / "run", "--twin_pairs", "8", "--observe_pairs", "50")
    assert found["margin_r2"] > 0.98  # all observed pairs are measured
    record = load_run(tmp_path / "run").record["forecast"]
    assert record["anchors"].keys() == {"0"}


def test_pairs_without_features_are_looked_at_in_the_end(trained, tmp_path):
    flags = ("--relinearise_every", "1", "--twin_pairs", "6", "--observe_pairs", "50")
    verified(trained, tmp_path / "run", *flags)
    folder = load_run(tmp_path / "run")
    said, missed = (folder.read_arrays("forecast_pairs")[name] for name in ("margins", "missed"))
    assert folder.record["forecast"]["look_explains"] > 0.99
    assert 0 < (missed == 0).sum() < (missed != 0).sum()  # measured pairs need no look
    observed = folder.read_arrays("observed_pairs")["margins"][-1][missed != 0]
    looked, stood_for = said[-1][missed != 0], (said[-1] - missed)[missed != 0]
    assert np.corrcoef(looked, observed)[0, 1] > 0.85 > 0.5 > np.corrcoef(stood_for, observed)[0, 1]


@pytest.mark.parametrize("held_out", ["0.2", "0"])
def test_after_a_pilot_curves_begin_where_it_was_observed(held_out, tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    flags = ("--pilot_fraction", "0.5", "--relinearise_every", "2", "--twin_pairs", "6", "--observe_pairs", "50")
    flags += ("--test_fraction", held_out)
    assert run("forecast", *command(tiny_folder, persona_file, out, *flags)) == 0
    folder = load_run(out)
    said, pilot = folder.read_arrays("forecast_pairs"), folder.read_arrays("pilot/observed")
    begun = said["steps"].tolist().index(6)
    np.testing.assert_allclose(said["margins"][begun], pilot["margins"][-1], atol=1e-4)
    answer = foretune.what_if(out, observations=5)
    np.testing.assert_allclose(answer.margins, said["margins"], atol=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "nca_pair"])
def test_where_no_row_is_held_out_those_without_features_are_scored_at_each_anchor(
    loss, tiny_folder, persona_file, tmp_path
):
    out = tmp_path / "run"
    flags = ("--relinearise_every", "4", "--twin_pairs", "6", "--observe_pairs", "20", "--test_fraction", "0")
    flags += ("--loss_type", loss)
    assert run("forecast", *command(tiny_folder, persona_file, out, *flags)) == 0
    twin = StoredTwin(out)
    prepared = prepare(job_from(**twin.settings))
    model, found = trained_model(prepared), []
    for step in (0, 8):
        anchor = twin.anchors.get(step)
        for name, value in anchor.anchor.items():
            model.get_parameter(name).data.copy_(value)
        pairs = [prepared.pairs[int(pair)] for pair in anchor.looked.pairs]
        with torch.no_grad():
            slow = [[float(log_prob(model, pair.prompt_ids, ids)) for ids in pair.responses] for pair in pairs]
        chosen, rejected = np.transpose(slow)
        found.append(np.concatenate([chosen - rejected, chosen]) if loss == "nca_pair" else chosen - rejected)
    measured = measured_pairs(prepared)
    assert not np.isin(anchor.looked.pairs, measured).any()
    assert np.isin(anchor.looked.pairs, prepared.observed).all()
    assert np.bincount(prepared.pairs.behaviour[anchor.looked.pairs]).tolist() == [6, 6]  # as many as are measured
    assert np.abs(anchor.looked.margins).max() > 0.1
    np.testing.assert_allclose(anchor.looked.margins, found[1] - found[0], atol=1e-4)
    answer, said = foretune.what_if(twin, observations=5), load_run(out).read_arrays("forecast_pairs")
    np.testing.assert_allclose(answer.margins, said["margins"], atol=2e-5)
    assert not any("by heart" in note for note in load_run(out).record["forecast"]["notes"])


def test_what_ifs_know_what_was_looked_at(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    flags = ("--relinearise_every", "3", "--twin_pairs", "6", "--observe_pairs", "50")
    assert run("forecast", "--output_dir", str(tmp_path / "run"), *flags) == 0
    said = load_run(tmp_path / "run").read_arrays("forecast_pairs")
    answer = foretune.what_if(tmp_path / "run", observations=5)
    np.testing.assert_allclose(answer.margins, said["margins"], atol=1e-5)
    slower = foretune.what_if(tmp_path / "run", learning_rate=1e-6)
    assert np.abs(slower.margins[-1]).max() < 0.1 * np.abs(said["missed"]).max()


def test_step_control_takes_features_as_often_as_it_must(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    flags = ["--relinearise_tolerance", "0.02", "--relinearise_every", "2", "--learning_rate", "0.002"]
    assert run("forecast", *command(tiny_folder, persona_file, out, *flags)) == 0
    section = load_run(out).record["forecast"]
    assert [drift["step"] for drift in section["drifts"]] == [int(step) for step in section["anchors"] if step != "0"]
    assert len(section["drifts"]) >= 3
    losses = {
        (row["behaviour"], row["step"]): row["loss"]
        for row in load_run(out).read_table("forecast").to_pylist()
        if (row["method"], row["trained_on"], row["split"]) == ("simulated_run", "mixture", "train")
    }
    names = section["confidence"].keys()
    change = np.mean([abs(losses[name, section["steps"]] - losses[name, 0]) for name in names])
    ends = LIKELY_ERRORS[5 if len(section["anchors"]) >= 5 else 1]
    assert section["likely_error"] == pytest.approx([change * side for side in ends])


def test_a_band_of_one_run_is_refused(tiny_folder, persona_file, tmp_path, capsys):
    assert run("forecast", *command(tiny_folder, persona_file, tmp_path / "run", "--band_runs", "1")) == 2
    assert "at least 2 runs" in capsys.readouterr().err


def test_features_on_the_disk_give_the_same(tiny_folder, persona_file, tmp_path, monkeypatch):
    found = []
    for name, largest in (("memory", 2**30), ("disk", 0)):
        monkeypatch.setattr(anchors, "LARGEST_FEATURES", largest)
        assert run("forecast", *command(tiny_folder, persona_file, tmp_path / name)) == 0
        found.append(load_run(tmp_path / name).read_arrays("forecast_pairs")["margins"])
    np.testing.assert_allclose(*found, atol=1e-6)


def test_a_killed_forecast_takes_only_what_is_missing(tiny_folder, persona_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = command(tiny_folder, persona_file, out, "--relinearise_every", "4")
    measured = []

    def stop_at_the_third(model, *args, **kwargs):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return token_factors.measure_factors(model, *args, **kwargs)

    monkeypatch.setattr("foretune.verbs.forms.measure_factors", stop_at_the_third)
    assert run("forecast", *flags) == 130
    kept = {path: path.stat().st_mtime_ns for path in out.glob("features/step-*/states-*")}
    assert kept
    assert run("forecast", *flags) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert run("forecast", *command(tiny_folder, persona_file, tmp_path / "whole", "--relinearise_every", "4")) == 0
    found, expected = (load_run(path).read_arrays("forecast_pairs")["margins"] for path in (out, tmp_path / "whole"))
    np.testing.assert_array_equal(found, expected)


FULL = ("--use_peft", "False", "--trainable", "full", "--learning_rate", "0.00002")


@pytest.fixture(scope="module")
def trained_fully(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("train", *command(tiny_folder, persona_file, out, *FULL)) == 0
    return out


@pytest.mark.parametrize(("coordinates", "least"), [(10**9, 0.999), (20_000, 0.95)])
def test_a_run_of_all_weights_is_forecast_from_its_start(trained_fully, tmp_path, coordinates, least):
    found = verified(trained_fully, tmp_path / "run", "--twin_coordinates", str(coordinates), "--band_runs", "0")
    assert found["margin_r2"] > least
    assert found["margin_slope"] == pytest.approx(1, abs=0.1)
    error = load_run(tmp_path / "run").record["forecast"]["kernel_error"]
    assert error == 0 if coordinates > 10**6 else 0.001 < error < 0.1


def test_a_run_of_all_weights_goes_on_from_a_pilot(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    pilot = (*FULL, "--pilot_fraction", "0.5", "--twin_coordinates", "20000", "--band_runs", "4")
    assert run("forecast", *command(tiny_folder, persona_file, out, *pilot)) == 0
    assert run("train", "--output_dir", str(out)) == 0
    assert run("verify", "--output_dir", str(out)) == 0
    found = load_run(out).read_json("verification.json")
    assert [row["step"] for row in found["over_run"]] == [9, 12]
    assert found["margin_r2"] > 0.99
    assert found["margin_slope"] == pytest.approx(1, abs=0.1)


def test_whole_weights_can_be_linearised_anew_and_sampled_ones_cannot(trained_fully, tmp_path, capsys):
    anew = ("--relinearise_every", "3", "--band_runs", "0")
    found = verified(trained_fully, tmp_path / "whole", "--twin_coordinates", str(10**9), *anew)
    assert found["margin_r2"] > 0.9995
    shutil.copytree(trained_fully, tmp_path / "sampled")
    assert run("forecast", "--output_dir", str(tmp_path / "sampled"), "--twin_coordinates", "9000", *anew) == 2
    assert "of which 9000 coordinates in" in (said := capsys.readouterr().err)
    assert "--twin weight_space" in said


def test_all_weights_are_simulated_in_weight_space(trained_fully, tmp_path):
    """Features taken anew on the way follow the run, and answer what-ifs."""
    anew = ("--twin", "weight_space", "--factor_rank", "8", "--relinearise_every", "3", "--band_runs", "2")
    found = verified(trained_fully, tmp_path / "run", *anew)
    assert found["margin_r2"] > 0.9995
    assert found["margin_slope"] == pytest.approx(1, abs=0.02)
    forecast = load_run(tmp_path / "run").record["forecast"]
    assert [int(step) for step in forecast["anchors"]] == [0, 3, 6, 9]
    answer = foretune.what_if(tmp_path / "run")
    base = load_run(tmp_path / "run").read_arrays("forecast_pairs")["margins"]
    np.testing.assert_allclose(answer.margins[-1], base[-1], atol=1e-4)


def test_few_products_of_all_weights_say_nearly_as_much(trained_fully, tmp_path):
    found = verified(
        trained_fully, tmp_path / "run", "--twin", "weight_space", "--factor_rank", "4", "--band_runs", "0"
    )
    assert found["margin_r2"] > 0.99


def test_a_run_of_all_weights_in_weight_space_goes_on_from_a_pilot(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    pilot = (*FULL, "--pilot_fraction", "0.5", "--twin", "weight_space", "--band_runs", "0", "--optim", "adafactor")
    assert run("forecast", *command(tiny_folder, persona_file, out, *pilot)) == 0
    assert run("train", "--output_dir", str(out)) == 0
    assert run("verify", "--output_dir", str(out)) == 0
    found = load_run(out).read_json("verification.json")
    assert found["margin_r2"] > 0.99
    assert found["margin_slope"] == pytest.approx(1, abs=0.1)


def test_adapters_with_magnitudes_are_forecast_in_the_tangent_form(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    options = command(tiny_folder, persona_file, out, "--twin", "tangent", "--use_dora", "True", "--band_runs", "0")
    for verb in ("train", "forecast"):
        assert run(verb, *options) == 0
    assert run("verify", "--output_dir", str(out)) == 0
    assert load_run(out).read_json("verification.json")["margin_r2"] > 0.9
