"""A sample of each behaviour is audited; the run of all rows is forecast from it."""

from collections import Counter

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.cli.test_twin import command

import foretune
from foretune.errors import UserError
from foretune.records import load_run

FEW = ("--observe_pairs", "10", "--twin_pairs", "8")


@pytest.fixture(scope="module")
def sampled(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out, *FEW, "--audit_pairs", "9")) == 0
    return load_run(out)


def test_the_forecast_is_that_of_an_audit_of_all_rows(sampled, tiny_folder, persona_file, tmp_path):
    assert run("forecast", *command(tiny_folder, persona_file, tmp_path / "run", *FEW)) == 0
    ours, theirs = (folder.read_arrays("forecast_pairs") for folder in (sampled, load_run(tmp_path / "run")))
    np.testing.assert_array_equal(ours["pair_id"], theirs["pair_id"])
    np.testing.assert_allclose(ours["margins"], theirs["margins"], atol=1e-5)


def test_rankings_are_sampled_whole(tiny_folder, tmp_path):
    flags = (*FEW, "--ranking_loss", "plackett_luce", "--band_runs", "0")
    for name, more in (("all", ()), ("some", ("--audit_pairs", "9"))):
        assert run("forecast", *command(tiny_folder, "bundled:rankings", tmp_path / name, *flags, *more)) == 0
    some, every = (load_run(tmp_path / name) for name in ("some", "all"))
    ours, theirs = (folder.read_arrays("forecast_pairs") for folder in (some, every))
    np.testing.assert_allclose(ours["margins"], theirs["margins"], atol=1e-5)
    assert any("pairs are audited" in note for note in some.record["audit"]["notes"])
    assert run("train", "--output_dir", str(some.path)) == 0
    assert run("verify", "--output_dir", str(some.path)) == 0


def test_all_rows_are_in_the_table_and_figures_of_the_sample_alone(sampled):
    rows = sampled.read_table("pairs").to_pylist()
    known = Counter((row["behaviour"], row["split"]) for row in rows if row["reference_margin"] is not None)
    there = Counter((row["behaviour"], row["split"]) for row in rows)
    # ten are observed, though nine would be audited
    assert known == {group: min(count, 10) for group, count in there.items()} != there
    assert all(row["alignment"] is None for row in rows if row["reference_margin"] is None)
    table = sampled.read_table("behaviours").to_pylist()
    assert {(row["behaviour"], row["split"]): row["num_pairs"] for row in table} == known
    assert any("pairs are audited" in note for note in sampled.record["audit"]["notes"])


def test_what_ifs_are_of_all_rows(sampled):
    answer = foretune.what_if(sampled, drop=[sampled.record["audit"]["kernel"]["behaviours"][0]])
    assert all(np.isfinite(row["loss_change"]) for row in answer.rows)
    with pytest.raises(UserError, match="audit_pairs"):
        foretune.what_if(sampled, objective="simpo")


def test_the_run_that_was_forecast_is_trained_on_all_rows(sampled):
    assert run("train", "--output_dir", str(sampled.path)) == 0
    assert run("verify", "--output_dir", str(sampled.path)) == 0
    assert (
        load_run(sampled.path).read_json("verification.json")["margin_r2"] > 0.75
    )  # stand-ins stand for half of the rows
    assert all(value >= 0 for value in sampled.record["train"]["divergence"]["train"].values())
    assert "38 preference pairs, 20 of them audited" in (sampled.path / "report.html").read_text()


def test_the_output_layer_needs_every_row(tiny_folder, persona_file, tmp_path, capsys):
    flags = command(tiny_folder, persona_file, tmp_path / "run", "--audit_pairs", "9", "--twin", "output_layer")
    assert run("forecast", *flags) == 2
    assert "--audit_pairs 9" in capsys.readouterr().err
    assert not (tmp_path / "run" / "record.json").exists()
