"""A run that is cheaper than its forecast is trained: its curves are the forecast."""

import shutil

import numpy as np
import pytest
from tests.cli.test_twin import command, run

from foretune import load_run


@pytest.fixture(scope="module")
def forecast(tiny_folder, persona_file, tmp_path_factory):
    """One batch of eight rows, where 36 pairs would be measured."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("forecast", *short(tiny_folder, persona_file, out)) == 0
    return out


def short(tiny_folder, persona_file, out):
    words = command(tiny_folder, persona_file, out)
    place = words.index("--factor_rank")
    return [*words[:place], *words[place + 2 :], "--max_steps", "3"]


def test_its_curves_are_those_of_training(forecast, tiny_folder, persona_file, tmp_path):
    assert run("train", *short(tiny_folder, persona_file, tmp_path / "run")) == 0
    said, trained = load_run(forecast), load_run(tmp_path / "run")
    rows = said.need_table("forecast").to_pylist()
    assert {(row["method"], row["trained_on"]) for row in rows} == {("real_run", "mixture")}
    assert [(row["step"], row["behaviour"], row["loss"]) for row in rows] == [
        (row["step"], row["behaviour"], row["loss"]) for row in trained.need_table("observed").to_pylist()
    ]
    arrays = [said.need_arrays("forecast_pairs"), trained.need_arrays("observed_pairs")]
    for name in ("pair_id", "steps", "margins"):
        np.testing.assert_array_equal(*(own[name] for own in arrays))
    record = said.record["forecast"]
    assert (record["pilot_steps"], record["steps"], record["cost"]) == (3, 3, 1.0)
    assert set(record["learning_order"]) == set(said.record["audit"]["initial_rates"])
    assert any("no more rows than a forecast" in note for note in record["notes"])


def test_nothing_is_left_for_train_and_for_another_forecast(forecast, capsys):
    before = (forecast / "forecast.parquet").stat().st_mtime_ns
    for verb in ("train", "forecast"):
        assert run(verb, "--output_dir", str(forecast)) == 0
        assert f"{verb}: already in the run folder" in capsys.readouterr().err
    assert (forecast / "forecast.parquet").stat().st_mtime_ns == before


def test_the_report_shows_one_curve_and_asks_for_no_other(forecast):
    page = (forecast / "report.html").read_text()
    assert "Solid: observed" not in page and "The forecast gave" not in page
    assert "foretune verify --output_dir" not in page


@pytest.mark.parametrize("question", [("verify", "--output_dir"), ("what_if",)])
def test_what_needs_features_says_how_to_get_them(forecast, question, capsys):
    assert run(*question, str(forecast)) == 2
    said = capsys.readouterr().err
    assert "is the run itself" in said and "--relinearise_every 0" in said


def test_a_forecast_that_is_asked_for_is_made(forecast, tmp_path):
    shutil.copytree(forecast, tmp_path / "run")
    assert run("forecast", "--output_dir", str(tmp_path / "run"), "--relinearise_every", "0") == 0
    assert load_run(tmp_path / "run").record["forecast"]["pilot_steps"] == 0
    assert run("verify", "--output_dir", str(tmp_path / "run")) == 0
