"""`foretune reproduce` on a tiny model: applicable and not applicable claims, choice, resumption, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.cli.test_cli import run

import foretune
from foretune.claims.reproduce import CLAIMS
from foretune.claims.study import Study
from foretune.errors import UserError
from foretune.records import load_run


def command(model, data, out, *more):
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)]
    return ["reproduce", *flags, "--dtype", "float32", "--max_pairs_per_behaviour", "16", "--draws", "20", *more]


def pages(out):
    return {page["claim"]: page for page in load_run(out).read_json("claims.json")}


LAST_LAYER = "R1,R2,R3,R4,R5,R7,R11,R12,R13"


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(*command(tiny_folder, "bundled:statements", out, "--claims", LAST_LAYER)) == 0
    return out


def test_claims_of_the_last_layer_are_judged(finished):
    found = pages(finished)
    assert set(found) == set(LAST_LAYER.split(","))
    assert all(page["verdict"] in ("shown", "not shown", "opposite") for page in found.values())
    proven = {name: found[name]["verdict"] for name in ("R1", "R2", "R3", "R4")}
    assert proven["R2"] == proven["R4"] == "shown"
    controls = " ".join(check["what"] for check in found["R1"]["checks"])
    assert all(word in controls for word in ("permuted", "Adam", "newline", "three of one answer"))


def test_the_page_has_a_section_for_every_claim(finished):
    page = (finished / "reproduction.html").read_text("utf-8")
    assert all(f'<section id="{name}">' in page for name in LAST_LAYER.split(","))
    assert "http" not in page.split("<script")[0]


def test_finished_claims_are_kept_and_others_added(finished, tiny_folder, capsys):
    before = pages(finished)
    assert run(*command(tiny_folder, "bundled:statements", finished, "--claims", "R2,R14")) == 0
    said = capsys.readouterr()
    assert "R2: " not in said.err and "R14: " in said.err
    after = pages(finished)
    assert {name: after[name] for name in before} == before and "R14" in after


REAL = "R6,R8,R9,R10,R14"


@pytest.fixture(scope="module", autouse=True)
def few_runs():
    """One behaviour in the figures and one dialogue are enough to see that all works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foretune.claims.dialogue.MOST_QUICK", 1)
        patch.setattr(Study, "five", lambda study: study.spread(1))
        yield


@pytest.fixture(scope="module")
def with_runs(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "real"
    flags = ["--quick", "--num_train_epochs", "1", "--claims", REAL]
    assert run(*command(tiny_folder, "bundled:statements", out, *flags)) == 0
    return out


def test_claims_about_real_runs_are_judged(with_runs):
    found = pages(with_runs)
    assert all(found[name]["verdict"] in ("shown", "not shown", "opposite") for name in REAL.split(","))
    assert found["R8"]["plots"][0]["x_label"] == "layer"
    assert any("t-SNE" in plot["x_label"] for plot in found["R8"]["plots"])
    assert found["R9"]["checks"][-1]["value"] == pytest.approx(1)
    assert any("CHES" in check["what"] for check in found["R14"]["checks"])
    assert (with_runs / "dialogue" / "behaviours.parquet").exists()


def test_real_runs_are_not_repeated(with_runs, tiny_folder, monkeypatch):
    monkeypatch.setattr("foretune.claims.tuning.train", None)
    flags = ["--quick", "--num_train_epochs", "1", "--claims", "R6", "--restart", "True"]
    assert run(*command(tiny_folder, "bundled:statements", with_runs, *flags)) == 0


def test_what_data_cannot_show_is_not_applicable(tiny_folder, persona_file, tmp_path, capsys):
    assert run(*command(tiny_folder, persona_file, tmp_path / "few", "--claims", "R1,R2")) == 0
    few = pages(tmp_path / "few")
    assert few["R1"]["verdict"] == "not applicable" and "this claim needs 8" in few["R1"]["reason"]
    assert few["R2"]["verdict"] == "shown"
    assert "not applicable" in capsys.readouterr().out
    assert run(*command(tiny_folder, "bundled:free_text", tmp_path / "text", "--claims", "R2")) == 0
    assert "one token" in pages(tmp_path / "text")["R2"]["reason"]
    flags = ["--claims", "R10", "--dialogue_dataset_name", str(persona_file)]
    assert run(*command(tiny_folder, persona_file, tmp_path / "few", *flags)) == 0
    assert "are the same two" in pages(tmp_path / "few")["R10"]["reason"]


def test_an_unknown_claim_is_refused(tiny_folder, tmp_path, capsys):
    assert run(*command(tiny_folder, "bundled:statements", tmp_path / "run", "--claims", "R99")) == 2
    assert f"no claim is called 'R99': there are {', '.join(CLAIMS)}." in capsys.readouterr().err


def test_other_losses_and_launchers_are_refused(tiny_folder, tmp_path, capsys, monkeypatch):
    assert run(*command(tiny_folder, "bundled:statements", tmp_path / "run", "--loss_type", "hinge")) == 2
    assert "the claims are about DPO, the run's loss is hinge" in capsys.readouterr().err
    monkeypatch.setattr("foretune.claims.reproduce.processes.count", lambda: 2)
    with pytest.raises(UserError, match="runs in one process, this launch has 2"):
        foretune.reproduce(model_name_or_path=str(tiny_folder), output_dir=str(tmp_path / "run"))


def test_a_killed_reproduction_continues(tiny_folder, tmp_path):
    out = tmp_path / "killed"
    arguments = [sys.executable, "-m", "foretune", *command(tiny_folder, "bundled:statements", out)]
    arguments += ["--claims", "R2,R4,R12"]
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300  # seconds on an idle machine
    while time.time() < deadline and not (out / "claims.json").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads((out / "claims.json").read_text())
    assert run(*arguments[3:]) == 0
    after = pages(out)
    assert list(after) == ["R2", "R4", "R12"]
    assert after["R2"] == before[0]
