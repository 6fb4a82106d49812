"""Values of arguments: typed wherever they come from, within their bounds, and wrong ones refused before any work."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.cli.test_cli import run

from foretune.errors import UserError
from foretune.verbs.job import job_from, parse_job
from foretune.verbs.reward_job import reward_job_from
from foretune.verbs.rlhf_job import rlhf_job_from

NEEDED = {"model_name_or_path": "smollm2-135m", "dataset_name": "x", "output_dir": "unused", "dtype": "float32"}


def job_of(tmp_path, text):
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(NEEDED) + text)
    return parse_job(["--config", str(tmp_path / "dpo.yaml")], prog="foretune forecast")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("beta: 1e-1", "beta", 0.1),
        ("test_fraction: 2e-1", "test_fraction", 0.2),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("observe_pairs: '5'", "observe_pairs", 5),
        ("draws: 1.0e+2", "draws", 100),
        ("max_length: null", "max_length", None),
        ("use_peft: 'yes'", "use_peft", True),
        ("forecast_alone: 'False'", "forecast_alone", False),
        ("behaviours: sailing", "behaviours", ["sailing"]),
        ("behaviours: [1, b]", "behaviours", ["1", "b"]),
        ("behaviour_column: 3", "behaviour_column", "3"),
        ("forecast_at: 0.3", "forecast_at", [0.3]),
        ("forecast_at: ['0.3', 0.5]", "forecast_at", [0.3, 0.5]),
        ("loss_type: ipo", "loss_type", ["ipo"]),
        ("lr_scheduler_kwargs: {a: 1}", "lr_scheduler_kwargs", {"a": 1}),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
    ],
)
def test_a_file_gives_what_the_flags_would(text, name, expected, tmp_path):
    job = job_of(tmp_path, text)
    found = job.explicit[name]
    assert found == expected and type(found) is type(expected)
    parts = (job.script, job.training, job.model, job.ours)
    assert expected in [getattr(part, name, None) for part in parts]


def test_pythons_own_numbers_and_paths_are_taken():
    given = {"draws": np.int64(7), "beta": np.float32(0.5), "seed": np.uint8(3), "use_peft": np.bool_(True)}
    job = job_from(**NEEDED | given | {"output_dir": Path("unused"), "behaviours": np.array(["a"])})
    assert {name: type(job.explicit[name]) for name in given} == {
        "draws": int,
        "beta": float,
        "seed": int,
        "use_peft": bool,
    }
    assert job.explicit["output_dir"] == "unused" and job.ours.behaviours == ["a"]
    yaml.safe_dump(job.explicit)  # as it is written into the run folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("observations: nine", "observations is 'nine': a whole number is needed."),
        ("observations: 4.5", "observations is 4.5: a whole number is needed."),
        ("draws: many", "draws is 'many': a whole number is needed."),
        ("draws: 1e2", "draws is '1e2': a whole number is needed."),
        ("draws: true", "draws is True: a whole number is needed."),
        ("draws: null", "draws is None: a whole number is needed."),
        ("max_length: long", "max_length is 'long': a whole number is needed."),
        ("max_length: 100.5", "max_length is 100.5: a whole number is needed."),
        ("forecast_at: half", "forecast_at is 'half': a number is needed."),
        ("band_runs: a", "band_runs is 'a': a whole number is needed."),
        ("seed: x", "seed is 'x': a whole number is needed."),
        ("pilot_fraction: a", "pilot_fraction is 'a': a number is needed."),
        ("learning_rate: [1]", "learning_rate is [1]: a number is needed."),
        ("dataset_name: [a, b]", "dataset_name is ['a', 'b']: a text is needed."),
        ("use_peft: yes please", "use_peft is 'yes please': true or false is needed."),
        ("twin: x", "twin 'x' is none of output_layer, weight_space, tangent."),
        ("trainable: head", "trainable 'head' is none of unembedding, lora, full."),
        ("method: dppo", "method 'dppo' is none of dpo, simpo"),
        ("env: [a]", "must be a mapping of environment variables to values."),
        ("5: x", "has the key 5: keys must be names of arguments."),
        ("learning_rte: 1", "unknown argument learning_rte; did you mean learning_rate?"),
    ],
)
def test_values_of_another_type_are_refused(text, said, tmp_path):
    with pytest.raises(UserError) as refused:
        job_of(tmp_path, text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draws": 0}, "draws is 0: it must be at least 1."),
        ({"sketch_dim": 0}, "at least 1"),
        ({"factor_rank": 0}, "at least 1"),
        ({"twin_coordinates": -1}, "at least 1"),
        ({"observations": 1}, "at least 2"),
        ({"relinearise_every": -1}, "at least 0"),
        ({"relinearise_tolerance": 0.0}, "above 0"),
        ({"pilot_fraction": -0.1}, "at least 0 and below 1"),
        ({"pilot_fraction": 1.0}, "at least 0 and below 1"),
        ({"alone_mass": 2.0}, "above 0 and at most 1"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1.0: it must be above 0."),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"gradient_accumulation_steps": 0}, "at least 1"),
        ({"learning_rate": -1}, "a finite number of at least 0"),
        ({"learning_rate": "nan"}, "a finite number of at least 0"),
        ({"max_length": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(changes, said):
    with pytest.raises(UserError, match=f"{next(iter(changes))} is .*: it must be .*{said.rpartition('be ')[2]}"):
        job_from(**NEEDED | changes)


def test_steps_stand_for_epochs():
    assert job_from(**NEEDED, num_train_epochs=0, max_steps=3).training.max_steps == 3


@pytest.mark.parametrize("make", [reward_job_from, rlhf_job_from])
def test_other_verbs_check_the_same(make):
    with pytest.raises(UserError, match="observations is 0: it must be at least 2."):
        make(**NEEDED, observations=0)
    with pytest.raises(UserError, match="learning_rate is 'fast': a number is needed."):
        make(**NEEDED, learning_rate="fast")


def test_flags_out_of_bounds_end_with_a_sentence(tmp_path, capsys):
    flags = [part for name, value in NEEDED.items() for part in (f"--{name}", value)]
    assert run("forecast", *flags, "--output_dir", str(tmp_path / "run"), "--factor_rank", "0") == 2
    assert "factor_rank is 0: it must be at least 1." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_bootstrap_of_verify_is_bounded_too(tmp_path, capsys):
    for name, value in (("draws", "0"), ("draws", "-1"), ("seed", "-1")):
        assert run("verify", "--output_dir", str(tmp_path), f"--{name}", value) == 2
        assert f"{name} is {value}: it must be at least" in capsys.readouterr().err
