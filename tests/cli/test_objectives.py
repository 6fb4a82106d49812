"""Every loss of a margin is forecast as it is trained; other losses are refused with the reason."""

import numpy as np
import pytest
from tests.cli.test_cli import command, run
from tests.cli.test_twin import command as lora_command

import foretune
from foretune.errors import UserError
from foretune.records import load_run
from foretune.verbs.job import job_from

WORDS = ["soil", "mast", "rain on the roof", "a very long walk by the sea", "rope"]


def verified(make, folder, data, out, *flags):
    arguments = make(folder, data, out, "--max_steps", "4", *flags)
    for verb in ("forecast", "train"):
        assert run(verb, *arguments) == 0
    assert run("verify", "--output_dir", str(out)) == 0
    return load_run(out).read_json("verification.json")


@pytest.mark.parametrize(
    "flags",
    [
        ("ipo", "--beta", "0.2"),
        ("exo_pair", "--label_smoothing", "0.1", "--beta", "1.0"),
        ("discopop", "--beta", "0.5"),
    ],
    ids=lambda flags: flags[0],
)
def test_the_forecast_of_the_unembedding_is_right_for_every_loss(flags, tiny_folder, unequal_file, tmp_path):
    found = verified(command, tiny_folder, unequal_file, tmp_path, "--loss_type", *flags)
    assert found["margin_r2"] > 0.999
    assert found["margin_slope"] == pytest.approx(1, abs=0.01)
    assert found["relative_loss_error"] < 0.01
    curves = load_run(tmp_path).read_table("forecast").to_pylist()
    flows = {row["method"] for row in curves} - {"simulated_run"}
    assert bool(flows) == (flags[0] != "ipo")


def test_adapters_trained_on_means_over_tokens_are_forecast(tiny_folder, unequal_file, tmp_path):
    flags = ("--loss_type", "ipo", "--beta", "0.2", "--relinearise_every", "1", "--learning_rate", "0.001")
    found = verified(lora_command, tiny_folder, unequal_file, tmp_path, *flags)
    assert found["margin_r2"] > 0.999
    assert found["margin_slope"] == pytest.approx(1, abs=0.02)


REFUSED = {
    "aot": "sorts the margins of a batch",
    "sft": "learns from the chosen responses alone",
    "kto_pair": "has no such loss",
    "robust": "label smoothing must lie in",
    "exo_pair": "EXO needs label smoothing",
}


@pytest.mark.parametrize("loss_type", REFUSED)
def test_losses_that_cannot_be_forecast_are_refused_with_the_reason(loss_type):
    smoothing = {"label_smoothing": 0.6} if loss_type == "robust" else {}
    job = job_from(model_name_or_path="x", dataset_name="y", loss_type=[loss_type], **smoothing)
    with pytest.raises(UserError, match=f"{loss_type} cannot be forecast.*{REFUSED[loss_type]}"):
        job.objective()


def test_several_or_weighted_losses_are_refused():
    several = job_from(model_name_or_path="x", dataset_name="y", loss_type=["sigmoid", "sft"])
    with pytest.raises(UserError, match=r"sigmoid \+ sft cannot be forecast: a forecast follows one loss"):
        several.objective()
    weighted = job_from(model_name_or_path="x", dataset_name="y", loss_type=["sigmoid"], loss_weights=[2.0])
    with pytest.raises(UserError, match="loss_weights cannot be forecast"):
        weighted.objective()


@pytest.fixture(scope="module")
def summed(tiny_folder, unequal_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sums"
    assert run("forecast", *lora_command(tiny_folder, unequal_file, out)) == 0
    return out


def test_means_do_not_follow_from_sums_of_unequal_responses(summed):
    with pytest.raises(UserError, match="equally long; make another forecast"):
        foretune.what_if(summed, objective="ipo")


def test_a_what_if_of_another_loss_equals_its_forecast(summed, tiny_folder, unequal_file, tmp_path):
    answer = foretune.what_if(summed, objective="exo_pair", label_smoothing=0.1)
    flags = ("--loss_type", "exo_pair", "--label_smoothing", "0.1")
    assert run("forecast", *lora_command(tiny_folder, unequal_file, tmp_path, *flags)) == 0
    expected = load_run(tmp_path).read_arrays("forecast_pairs")
    assert answer.pair_id.tolist() == expected["pair_id"].tolist()
    np.testing.assert_allclose(answer.margins[-1], expected["margins"][-1], atol=2e-4, rtol=1e-3)
