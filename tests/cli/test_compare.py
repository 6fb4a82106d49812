"""`foretune compare` through the command line, on a tiny model."""

import numpy as np
import pytest
from tests.cli.test_cli import run

from foretune.records import load_run


def command(folder, data, out, *more):
    return [
        *("--model_name_or_path", str(folder), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--max_steps", "6", "--per_device_train_batch_size", "8", "--draws", "20"),
        *("--trainable", "unembedding", "--learning_rate", "0.01", "--disable_tqdm", "True", *more),
    ]


def test_methods_are_run_on_the_same_rows_and_laid_side_by_side(tiny_folder, persona_file, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--methods", "dpo,simpo,aot,kto", "--seeds", "1,2")
    assert run("compare", *command(tiny_folder, persona_file, out, *flags)) == 0
    assert "simpo" in capsys.readouterr().out
    content = load_run(out).read_json("comparison.json")
    entries = {entry["method"]: entry for entry in content["methods"]}
    assert list(entries) == ["dpo", "simpo", "aot", "kto"]
    assert entries["dpo"]["seeds"] == [1, 2]
    assert entries["dpo"]["forecast"]["margin_r2"] > 0.999
    assert entries["simpo"]["forecast"]["margin_r2"] > 0.999
    assert entries["kto"]["forecast"]["margin_r2"] > 0.999
    assert entries["aot"]["forecast"] is None and "sorts the margins" in entries["aot"]["not_forecast_because"]
    assert content["order_agreement"][0][0] is None or content["order_agreement"][0][0] == 1
    pairs = [load_run(out / name).read_arrays("observed_pairs")["pair_id"] for name in ("dpo-seed1", "aot-seed2")]
    np.testing.assert_array_equal(*pairs)

    ends = [load_run(out / f"dpo-seed{seed}").read_table("observed").to_pylist() for seed in (1, 2)]
    name = "sailing"
    accuracies = [
        max((row for row in rows if (row["behaviour"], row["split"]) == (name, "test")), key=lambda row: row["step"])
        for rows in ends
    ]
    expected = np.mean([row["reward_accuracy"] for row in accuracies])
    assert entries["dpo"]["behaviours"][name]["reward_accuracy"] == pytest.approx(expected)
    spent = [load_run(out / f"dpo-seed{seed}").record["train"]["divergence"]["test"][name] for seed in (1, 2)]
    assert entries["dpo"]["behaviours"][name]["divergence"] == pytest.approx(np.mean(spent))
    assert all(f"<b>{name}</b>" in (out / "comparison.html").read_text() for name in entries)

    changed = {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/model.safetensors")}
    assert run("compare", *command(tiny_folder, persona_file, out, *flags)) == 0  # nothing is trained again
    assert changed == {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/model.safetensors")}


def test_features_at_the_start_are_taken_once_for_all_methods_with_the_same_scores(tiny_folder, persona_file, tmp_path):
    out = tmp_path / "run"
    lora = ("--use_peft", "True", "--trainable", "lora", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2")
    flags = ("--methods", "dpo,slic,ipo", "--band_runs", "0", *lora)
    assert run("compare", *command(tiny_folder, persona_file, out, *flags)) == 0
    shards = [sorted(out.glob(f"{name}-seed42/features/step-000000/states-*")) for name in ("dpo", "slic", "ipo")]
    assert all(shards)
    assert shards[1][0].samefile(shards[0][0]) and not shards[2][0].samefile(shards[0][0])
    alone = tmp_path / "alone"
    assert run("forecast", *command(tiny_folder, persona_file, alone, "--loss_type", "hinge", *flags[2:])) == 0
    found = [load_run(folder).read_arrays("forecast_pairs")["margins"] for folder in (out / "slic-seed42", alone)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--methods", "dpo,ppo"), "no method is called 'ppo'"),
        (("--methods", ","), "no method is named"),
        (("--seeds", "one"), "--seeds one"),
    ],
)
def test_wrong_input_is_refused_before_any_work(tiny_folder, persona_file, tmp_path, capsys, flags, sentence):
    out = tmp_path / "run"
    assert run("compare", *command(tiny_folder, persona_file, out, *flags)) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
