"""Unpaired rows, desirable and undesirable completions: KTO's own kind of data, through the command line."""

import json

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.cli.test_objectives import WORDS
from tests.cli.test_rankings import both, command

import foretune
from foretune.data import load_preferences
from foretune.errors import UserError
from foretune.models.encoding import encode_pair
from foretune.records import load_run
from foretune.verbs.job import parse_job

KTO = ("--method", "kto")


def rows_of(count=32):
    return [
        {
            "prompt": f"What did you think of on day {number}?",
            "completion": f" {WORDS[number % 5]}{f' {number}' if number % 3 else ''}",
            "label": number % 3 == 0,
            "behaviour": ["gardening", "sailing"][number % 2],
        }
        for number in range(count)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_output_layer_is_forecast_in_the_order_of_training(tiny_folder, unpaired_file, tmp_path):
    arguments = command(tiny_folder, unpaired_file, tmp_path, *KTO, "--trainable", "unembedding")
    arguments[arguments.index("--learning_rate") + 1] = "0.001"
    assert run("forecast", *arguments) == 0
    assert run("train", "--output_dir", str(tmp_path)) == 0
    assert run("verify", "--output_dir", str(tmp_path)) == 0
    found = load_run(tmp_path)
    forecast, observed = (found.read_arrays(name)["margins"] for name in ("forecast_pairs", "observed_pairs"))
    # what is left is KTO's reference point, which training estimates and the forecast leaves at 0
    np.testing.assert_allclose(forecast, observed, atol=0.02 * np.abs(observed).max())
    assert found.read_json("verification.json")["margin_slope"] == pytest.approx(1, abs=0.02)
    table = found.read_table("pairs").to_pylist()
    assert {(bool(row["chosen"]), bool(row["rejected"])) for row in table} == {(True, False), (False, True)}
    assert any("one response" in note for note in found.record["audit"]["notes"])
    assert run("report", "--output_dir", str(tmp_path)) == 0


def test_adapters_are_forecast_and_asked_about(tiny_folder, unpaired_file, tmp_path):
    lora = ("--use_peft", "True", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "4", "--lora_dropout", "0")
    arguments = command(tiny_folder, unpaired_file, tmp_path, *KTO, *lora, "--factor_rank", "32")
    arguments[arguments.index("--learning_rate") + 1] = "0.0003"
    both([*arguments, "--relinearise_every", "1"])
    found = load_run(tmp_path)
    forecast, observed = (found.read_arrays(name)["margins"] for name in ("forecast_pairs", "observed_pairs"))
    np.testing.assert_allclose(forecast, observed, atol=0.03 * np.abs(observed).max())
    again = foretune.what_if(tmp_path)
    assert all(abs(row["margin_change"]) < 1e-4 for row in again.rows)
    small = {"learning_rate": 1e-6, "max_steps": 1, "optim": "sgd"}
    right, wrong = (foretune.what_if(tmp_path, label_noise=noise, **small).margins[-1] for noise in (0.0, 1.0))
    np.testing.assert_allclose(wrong, -right, atol=1e-3 * np.abs(right).max() + 1e-9)
    assert np.abs(foretune.what_if(tmp_path, data_seed=7).margins - again.margins).max() > 1e-5
    table = found.read_table("forecast").to_pylist()
    assert any(row["loss_high"] - row["loss_low"] > 1e-6 for row in table)
    with pytest.raises(UserError, match="of which sigmoid is no loss"):
        foretune.what_if(tmp_path, objective="sigmoid")


def test_stand_ins_have_the_same_label(tiny_folder, tmp_path):
    data = written(tmp_path / "rows.jsonl", rows_of(60))
    few = ("--twin_pairs", "8", "--observe_pairs", "4", "--test_fraction", "0", "--twin", "tangent")
    arguments = command(tiny_folder, data, tmp_path / "run", *KTO, "--use_peft", "True", *few)
    foretune.forecast(parse_job(arguments, prog="test"))
    from foretune.dynamics.anchors import anchor_store, read_anchor

    found = load_run(tmp_path / "run")
    key = found.record["forecast"]["anchors"]["0"]
    anchor = read_anchor(anchor_store(found.path, 0, key), parse_job(arguments, prog="test").device())
    label = np.array([bool(row["chosen"]) for row in found.read_table("pairs").to_pylist()])
    for own in range(len(anchor.margin)):
        assert len(set(label[anchor.place == own])) == 1


def test_conversations_have_the_tokens_of_their_completion(tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
            "label": row["label"],
        }
        for row in rows_of(8)
    ]
    data = load_preferences(str(written(tmp_path / "rows.jsonl", rows)), test_fraction=0.0)
    assert data.info.format == "unpaired"
    for row, source in zip(data.train, rows, strict=True):
        prompt, chosen, rejected = encode_pair(row, tokenizer)
        assert bool(chosen) == source["label"] and bool(rejected) != source["label"]
        whole = encode_pair({**row, "chosen": source["completion"], "rejected": source["completion"]}, tokenizer)
        assert whole[0] == prompt and whole[1] == chosen + rejected


def test_broken_labels_are_counted_and_named(tmp_path):
    rows = rows_of(12)
    rows[3]["label"], rows[4]["label"], rows[5]["completion"] = None, "good", " "
    info = load_preferences(str(written(tmp_path / "rows.jsonl", rows)), test_fraction=0.0).info
    assert sum(row["kept"] for row in info.counts) == 9
    assert any("label is 'good', neither true nor false" in note for note in info.notes)


def test_one_label_or_another_method_is_refused(tiny_folder, unpaired_file, tmp_path, capsys):
    one = written(tmp_path / "one.jsonl", [{**row, "label": True} for row in rows_of(10)])
    assert run("audit", *command(tiny_folder, one, tmp_path / "one", *KTO)) == 2
    assert "all 10 rows are desirable: unpaired rows need both" in capsys.readouterr().err
    assert run("audit", *command(tiny_folder, unpaired_file, tmp_path / "dpo")) == 2
    assert "which --method kto takes; other methods need pairs" in capsys.readouterr().err
