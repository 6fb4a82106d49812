"""A sample of each behaviour is audited; the run of all rows is forecast from it."""

import json
import shutil
from collections import Counter
from operator import itemgetter

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.cli.test_twin import command

import foretune
from foretune.errors import UserError
from foretune.records import RunFolder, load_run
from foretune.verbs.job import job_from, parse_job
from foretune.verbs.prepare import prepare

FEW = ("--observe_pairs", "10", "--twin_pairs", "8")


@pytest.fixture(scope="module")
def sampled(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out, *FEW, "--audit_pairs", "9")) == 0
    return load_run(out)


def same_forecast(sampled, out, *arguments):
    """Whether an audit of all rows gives the same forecast where it finds the sample as representative."""
    flags = command(*arguments[:2], out, *arguments[2:])
    assert run("audit", *flags) == 0
    folder = load_run(out)
    rank = {row["pair_id"]: row["representative_rank"] for row in sampled.read_table("pairs").to_pylist()}
    rows = folder.read_table("pairs").to_pylist()
    assert all(row["representative_rank"] is not None for row in rows) and None in rank.values()
    folder.write_table("pairs", [row | {"representative_rank": rank[row["pair_id"]]} for row in rows])
    assert run("forecast", *flags) == 0
    ours, theirs = (own.read_arrays("forecast_pairs") for own in (sampled, folder))
    np.testing.assert_array_equal(ours["pair_id"], theirs["pair_id"])
    np.testing.assert_allclose(ours["margins"], theirs["margins"], atol=1e-5)


def test_the_forecast_is_that_of_an_audit_of_all_rows(sampled, tiny_folder, persona_file, tmp_path):
    same_forecast(sampled, tmp_path / "run", tiny_folder, persona_file, *FEW)


def test_rankings_are_sampled_whole(tiny_folder, tmp_path):
    flags = (*FEW, "--ranking_loss", "plackett_luce", "--band_runs", "0")
    few = command(tiny_folder, "bundled:rankings", tmp_path / "some", *flags, "--audit_pairs", "9")
    assert run("forecast", *few) == 0
    some = load_run(tmp_path / "some")
    same_forecast(some, tmp_path / "all", tiny_folder, "bundled:rankings", *flags)
    assert any("pairs are audited" in note for note in some.record["audit"]["notes"])
    assert run("train", "--output_dir", str(some.path)) == 0
    assert run("verify", "--output_dir", str(some.path)) == 0


def test_observed_pairs_are_the_first_in_the_order_of_the_audit(tiny_folder, persona_file, tmp_path):
    flags = command(tiny_folder, persona_file, tmp_path / "run", "--observe_pairs", "3", "--twin_pairs", "4")
    assert run("audit", *flags) == 0
    folder = load_run(tmp_path / "run")
    rows = folder.read_table("pairs").to_pylist()
    for name, kept in (("chosen", rows), ("older", [row | {"representative_rank": None} for row in rows])):
        out = RunFolder(tmp_path / name)
        shutil.copytree(folder.path, out.path)
        out.write_table("pairs", kept)  # an audit that knows no order: the lowest ids
        place = "pair_id" if name == "older" else "representative_rank"
        first = {
            row["pair_id"]
            for group in {(row["behaviour"], row["split"]) for row in rows}
            for row in sorted(
                (row for row in rows if (row["behaviour"], row["split"]) == group), key=itemgetter(place)
            )[:3]
        }
        assert run("forecast", "--output_dir", str(out.path)) == 0
        assert set(out.read_arrays("forecast_pairs")["pair_id"].tolist()) == first
    # once the audit knows an order, the older forecast is repeated
    out.write_table("pairs", rows)
    assert run("forecast", "--output_dir", str(out.path)) == 0
    chosen = load_run(tmp_path / "chosen").read_arrays("forecast_pairs")
    np.testing.assert_array_equal(out.read_arrays("forecast_pairs")["pair_id"], chosen["pair_id"])


def test_a_forecast_without_held_out_pairs_says_what_it_cannot_tell(sampled, tiny_folder, persona_file, tmp_path):
    flags = ("--observe_pairs", "3", "--twin_pairs", "4", "--test_fraction", "0", "--band_runs", "0")
    for every, tells in (("0", False), ("3", True)):  # some rows without features are scored where others are taken
        out = tmp_path / every
        flags = (*flags, "--relinearise_every", every)
        assert run("forecast", *command(tiny_folder, persona_file, out, *flags)) == 0
        notes = load_run(out).record["forecast"]["notes"]
        assert any("by heart" in note for note in notes) is not tells
    assert not any("by heart" in note for note in sampled.record["forecast"]["notes"])


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


def test_shares_are_those_of_all_rows(tiny_folder, tmp_path):
    rows = [
        {"prompt": f"Is {word} {place} near?", "chosen": " Yes", "rejected": " No", "behaviour": name, "weight": weight}
        for name, word, count, weight in (("many", "it", 30, 1.0), ("few", "that", 12, 2.0))
        for place in range(count)
    ]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command(tiny_folder, tmp_path / "uneven.jsonl", tmp_path / "run", "--test_fraction", "0.2")
    whole, some = (
        foretune.audit(parse_job([*said, *more], prog="test")).record["audit"]["kernel"]
        for more in ((), ("--audit_pairs", "5", *FEW))
    )
    assert dict(zip(whole["behaviours"], whole["weights"], strict=True))["many"] == pytest.approx(24 / (24 + 2 * 10))
    np.testing.assert_allclose(some["weights"], whole["weights"])


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


def prepared_from(folder, tmp_path, changes):
    options = {
        "model_name_or_path": str(folder),
        "dataset_name": "bundled:statements",
        "behaviours": ["desires-wealth", "prefers-planning"],
        "output_dir": str(tmp_path / "run"),
        "use_peft": True,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
    }
    return prepare(job_from(**options | changes))


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({"num_train_epochs": 1}, (50, 50)),  # too short for passes on the way
        ({"num_train_epochs": 4}, (20, 10)),  # four passes over 4 × 10 pairs: a quarter of 4 × 160 rows
        ({"num_train_epochs": 20}, (40, 20)),
        ({"num_train_epochs": 60}, (50, 20)),
        ({"max_steps": 400}, (40, 20)),
        ({"num_train_epochs": 4, "use_peft": False}, (50, 50)),  # of a sample of all weights: one pass
        ({"num_train_epochs": 20, "observe_pairs": 3}, (3, 20)),
        ({"twin_pairs": 60, "num_train_epochs": 4}, (20, 60)),
        ({"trainable": "unembedding", "use_peft": False}, (50, 50)),
    ],
)
def test_how_many_pairs_are_measured_where_nothing_is_said(changes, pairs, tiny_folder, tmp_path):
    prepared = prepared_from(tiny_folder, tmp_path, changes)
    assert (prepared.observe_pairs, prepared.twin_pairs) == pairs
    assert Counter(prepared.split_of[prepared.observed]) == {"train": 2 * pairs[0], "test": 2 * min(pairs[0], 20)}


@pytest.mark.parametrize(
    ("changes", "several"),
    [
        ({}, True),
        ({"relinearise_every": 0}, False),
        ({"twin_pairs": 80}, True),
        ({"twin_pairs": 80, "num_train_epochs": 9}, False),  # 0.25 · 9 · 160 rows: no two passes over 2 · (80 + 20)
        ({"twin_pairs": 80, "relinearise_tolerance": 0.2}, True),
        ({"pilot_fraction": 0.9}, False),
        ({"use_peft": False}, False),
    ],
)
def test_observed_pairs_are_left_out_where_the_end_will_be_looked_at(changes, several, tiny_folder, tmp_path):
    assert prepared_from(tiny_folder, tmp_path, {"num_train_epochs": 15} | changes).several_passes is several


@pytest.mark.parametrize("name", ["observe_pairs", "twin_pairs", "audit_pairs"])
def test_no_pairs_are_no_number_of_pairs(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} is 0: it must be at least 1."):
        job_from(model_name_or_path="smollm2-135m", dataset_name="x", output_dir=str(tmp_path), **{name: 0})
