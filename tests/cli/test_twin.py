"""Forecasts of LoRA runs through the command line: from the start, from a pilot, with features taken anew."""

import shutil

import numpy as np
import pytest
from tests.cli.test_cli import run

from foretune.records import load_run


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
