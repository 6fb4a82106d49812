"""Nothing that is kept in a run folder is taken for something else: what changes a number is in the keys."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.cli.test_cli import run
from tests.cli.test_twin import command
from transformers import AutoConfig

import foretune
from foretune import processes
from foretune.errors import UserError
from foretune.models.load import load_model, weights_hash
from foretune.records import load_run
from foretune.training.trainer import PreferenceTrainer
from foretune.verbs.forecast import forecast_key
from foretune.verbs.job import job_from
from foretune.verbs.prepare import prepare
from foretune.verbs.real_run import training_key
from foretune.verbs.what_if import StoredTwin


def settings(folder, data, out, **more):
    return {
        "model_name_or_path": str(folder),
        "dataset_name": str(data),
        "output_dir": str(out),
        "dtype": "float32",
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "draws": 20,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 4,
        "lora_dropout": 0.0,
        "learning_rate": 3e-4,
        "observations": 3,
        "band_runs": 0,
        "disable_tqdm": True,
        **more,
    }


def margins(*where, **more):
    return foretune.forecast(**settings(*where, **more)).read_arrays("forecast_pairs")["margins"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"lora_target_modules": ["q_proj", "v_proj"]}, {"lora_target_modules": ["q_proj", "k_proj"]}),
        ({"twin": "tangent", "lora_alpha": 16}, {"twin": "tangent", "lora_alpha": 64}),
    ],
    ids=["other modules of the same shape", "another scaling"],
)
def test_features_of_other_adapters_are_not_taken_again(first, second, tiny_folder, persona_file, tmp_path):
    before = margins(tiny_folder, persona_file, tmp_path / "one", **first)
    again = margins(tiny_folder, persona_file, tmp_path / "one", **second)
    np.testing.assert_array_equal(again, margins(tiny_folder, persona_file, tmp_path / "two", **second))
    assert np.abs(again - before).max() > 1e-3


@pytest.fixture(scope="module")
def piloted(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    foretune.forecast(**settings(tiny_folder, persona_file, out, pilot_fraction=0.5, observe_pairs=6))
    return out


def test_a_pilot_that_observed_other_pairs_is_not_gone_on_from(piloted, tiny_folder, persona_file, tmp_path):
    shutil.copytree(piloted, tmp_path / "run")
    again = settings(tiny_folder, persona_file, tmp_path / "run", pilot_fraction=0.5, observe_pairs=6)
    foretune.forecast(**again)
    with pytest.raises(UserError, match="other settings, observed pairs or processes"):
        foretune.forecast(**{**again, "audit_pairs": 7, "twin_pairs": 6})


@pytest.mark.parametrize("lost", ["pilot/pilot.json", "pilot/observed.npz"])
def test_a_pilot_that_was_killed_before_it_was_kept_is_not_trained_again(
    lost, piloted, tiny_folder, persona_file, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(piloted, out)
    (out / lost).unlink()
    monkeypatch.setattr(PreferenceTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
    again = settings(tiny_folder, persona_file, out, pilot_fraction=0.5, observe_pairs=6, band_runs=2)
    found = foretune.forecast(**again)
    for name in ("forecast_pairs", "pilot/observed"):
        for had, has in zip(
            load_run(piloted).read_arrays(name).values(), found.read_arrays(name).values(), strict=True
        ):
            np.testing.assert_array_equal(has, had)


def test_a_shorter_pilot_than_what_is_trained_is_refused_before_it_is_trained(
    piloted, tiny_folder, persona_file, tmp_path, monkeypatch
):
    shutil.copytree(piloted, tmp_path / "run")
    monkeypatch.setattr(PreferenceTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
    with pytest.raises(UserError, match="up to step 3, past the pilot's end at step 2"):
        foretune.forecast(**settings(tiny_folder, persona_file, tmp_path / "run", pilot_fraction=0.3, observe_pairs=6))


def test_the_end_of_a_pilot_is_observed_though_the_run_would_not_be_there(tiny_folder, persona_file, tmp_path):
    again = settings(tiny_folder, persona_file, tmp_path / "run", pilot_fraction=0.5, observe_pairs=6, observations=2)
    assert foretune.forecast(**again).read_arrays("pilot/observed")["steps"].tolist() == [0, 3]
    assert foretune.train(**again).read_arrays("observed_pairs")["steps"].tolist() == [0, 3, 6]


def test_behaviours_alone_are_not_forecast_from_a_pilot(tiny_folder, persona_file, tmp_path):
    both = settings(tiny_folder, persona_file, tmp_path / "run", pilot_fraction=0.5, forecast_alone=True)
    with pytest.raises(UserError, match="leave one of the two out"):
        foretune.forecast(**both)
    assert not (tmp_path / "run" / "pilot").exists()


def test_a_changed_run_ends_after_the_pilot(piloted):
    twin = StoredTwin(piloted)
    twin.settings |= {"max_steps": 2}  # as where too few rows are left
    with pytest.raises(UserError, match="has 2 steps, and the forecast begins after a pilot of 3"):
        foretune.what_if(twin)


def test_runs_of_other_numbers_of_processes_have_other_keys(tiny_folder, persona_file, tmp_path, monkeypatch):
    prepared = prepare(job_from(**settings(tiny_folder, persona_file, tmp_path / "run")))
    keys = {forecast_key(prepared), training_key(prepared)}
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert not keys & {forecast_key(prepared), training_key(prepared)}


@pytest.fixture(scope="module")
def forecast(tiny_folder, persona_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("forecast", *command(tiny_folder, persona_file, out)) == 0
    return out


def test_a_what_if_changes_the_run_that_was_forecast(forecast, tiny_folder, persona_file, tmp_path):
    shutil.copytree(forecast, tmp_path / "run")
    assert run("train", *command(tiny_folder, persona_file, tmp_path / "run", "--beta", "0.5")) == 0
    assert all(abs(row["loss_change"]) < 1e-6 for row in foretune.what_if(tmp_path / "run").rows)
    assert run("verify", "--output_dir", str(tmp_path / "run")) == 0
    found = load_run(tmp_path / "run").read_json("verification.json")
    assert "they differ in beta" in found["caveats"][0]


def test_a_what_if_has_the_steps_of_a_run_on_several_processes(forecast, tmp_path):
    shutil.copytree(forecast, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    record = json.loads(path.read_text())
    record["forecast"]["processes"] = 2
    path.write_text(json.dumps(record))
    one = foretune.what_if(forecast, max_steps=-1, num_train_epochs=2)
    two = foretune.what_if(tmp_path / "run", max_steps=-1, num_train_epochs=2)
    assert (one.steps[-1], two.steps[-1]) == (10, 6)  # five batches of rows an epoch


def test_other_configurations_of_the_same_weights_are_other_models(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    same = weights_hash(load_model(str(tiny_folder)).model)
    config.use_cache = False
    config.save_pretrained(tmp_path / "model")
    assert weights_hash(load_model(str(tmp_path / "model")).model) == same
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    config.save_pretrained(tmp_path / "model")
    assert weights_hash(load_model(str(tmp_path / "model")).model) != same


def test_a_run_killed_after_its_last_checkpoint_ends_at_its_last_step(tiny_folder, persona_file, tmp_path):
    said = settings(tiny_folder, persona_file, tmp_path / "run")
    folder = foretune.train(**said)
    files = [folder.path / "observed_pairs.npz", folder.path / "adapter_model.safetensors"]
    before = [np.load(files[0])["margins"], load_file(files[1])]
    folder.update_record(stages={"audit": folder.stages["audit"]})
    (tmp_path / "run" / "observed.parquet").unlink()
    assert foretune.train(**said).record["train"]["steps"] == 6
    np.testing.assert_allclose(np.load(files[0])["margins"], before[0], atol=1e-6)
    again = load_file(files[1])
    assert all(np.allclose(again[name], value, atol=1e-7) for name, value in before[1].items())


def test_the_last_checkpoint_alone_still_says_whose_it_is(tiny_folder, persona_file, tmp_path):
    said = settings(tiny_folder, persona_file, tmp_path / "run", save_total_limit=1)
    assert len([*foretune.train(**said).path.glob("checkpoint-*")]) == 1
    with pytest.raises(UserError, match="holds checkpoints of a run with other settings"):
        foretune.train(**{**said, "learning_rate": 1e-3})
