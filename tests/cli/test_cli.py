"""The command line on real input: every verb, every kind of bad input, a killed process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from foretune.cli.main import VERBS, main
from foretune.records import RunFolder, load_run
from foretune.verbs.replay import differences


def command(folder: Path, data: Path | str, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--max_steps", "6", "--per_device_train_batch_size", "8", "--draws", "50"),
        *("--trainable", "unembedding", "--learning_rate", "0.003", "--observations", "4", "--disable_tqdm", "True"),
        *more,
    ]


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tiny_folder, persona_file, tmp_path_factory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("audit", *command(tiny_folder, persona_file, out)) == 0
    assert run("forecast", "--output_dir", str(out)) == 0  # continues from the folder's config.yaml
    assert run("train", "--output_dir", str(out)) == 0
    assert run("verify", "--output_dir", str(out)) == 0
    return load_run(out)


def test_the_forecast_of_the_unembedding_is_right(finished):
    found = finished.read_json("verification.json")
    assert found["margin_r2"] > 0.999
    assert found["margin_slope"] == pytest.approx(1, abs=0.01)
    assert found["relative_loss_error"] < 0.01
    assert found["step"] == 6


def test_the_record_says_which_hypotheses_of_the_theory_fail(finished):
    found = finished.record["forecast"]["theory"]
    assert found
    for own in found.values():
        assert own["loss_drop_floor"] <= own["loss_drop_bound"]
        assert any(words.startswith("the optimiser is adamw") for words in own["failed_hypotheses"])


def test_tables_have_the_promised_columns(finished):
    def columns(name):
        return set(finished.read_table(name).column_names)

    assert columns("behaviours") >= set(
        "behaviour split num_pairs distinguishability distinguishability_debiased distinguishability_low "
        "distinguishability_high permutation_floor concentration trace separability priority "
        "generalised_distinguishability".split()
    )
    curves = set("behaviour split step loss reward_accuracy output_accuracy margin num_pairs".split())
    assert columns("forecast") >= curves | {"method"}
    assert columns("observed") >= curves
    assert set(finished.read_json("verification.json")) >= set(
        "spearman_loss spearman_accuracy margin_r2 margin_slope loss_mae relative_loss_error".split()
    )


def test_forecasts_hold_every_method_jointly_and_alone(finished):
    rows = finished.read_table("forecast").to_pylist()
    assert {(row["method"], row["trained_on"]) for row in rows} == {
        (method, on) for method in ("simulated_run", "gradient_flow", "second_order") for on in ("mixture", "alone")
    }
    assert {row["split"] for row in rows} == {"train", "test"}
    assert {row["loss"] for row in rows if row["step"] == 0} == {float(np.log(2))}


def test_report_json_card_and_page(finished, capsys):
    assert run("report", "--output_dir", str(finished.path), "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["behaviours"]
    assert run("report", "--output_dir", str(finished.path), "--format", "card") == 0
    assert "gardening" in capsys.readouterr().out
    (finished.path / "report.html").unlink()
    assert run("report", str(finished.path)) == 0
    assert "gardening" in (finished.path / "report.html").read_text("utf-8")


def test_the_saved_model_is_the_trained_one(finished, tokenizer):
    from transformers import AutoModelForCausalLM

    from foretune.models.encoding import encode
    from foretune.scores import pair_scores

    model = AutoModelForCausalLM.from_pretrained(finished.path).eval()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    texts = {row["pair_id"]: row for row in finished.read_table("pairs").to_pylist()}
    stored = finished.read_arrays("observed_pairs")
    rows = [{**texts[pair], "weight": 1.0} for pair in stored["pair_id"].tolist()]
    scores = pair_scores(model, list(encode(rows, tokenizer, split="train", max_length=None)))
    reference = np.array([row["reference_margin"] for row in rows])
    np.testing.assert_allclose((scores.chosen - scores.rejected).numpy() - reference, stored["margins"][-1], atol=1e-3)


def test_finished_verbs_are_not_repeated(finished, capsys):
    before = (finished.path / "behaviours.parquet").stat().st_mtime_ns
    assert run("train", "--output_dir", str(finished.path)) == 0
    assert "already in the run folder" in capsys.readouterr().err
    assert (finished.path / "behaviours.parquet").stat().st_mtime_ns == before


def test_replay_gives_the_same_numbers(finished, tmp_path):
    assert run("replay", str(finished.path), "--output_dir", str(tmp_path / "again"), "--tolerance", "1e-5") == 0


def test_other_settings_do_not_continue_a_foreign_run(finished, capsys):
    code = run("train", "--output_dir", str(finished.path), "--learning_rate", "0.5")
    assert code == 2
    assert "other settings" in capsys.readouterr().err


def test_python_verbs(tiny_folder, persona_file, tmp_path):
    import foretune

    run_folder = foretune.audit(
        model_name_or_path=str(tiny_folder), dataset_name=str(persona_file), output_dir=str(tmp_path), draws=20
    )
    assert run_folder.read_table("behaviours").num_rows == 4
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        foretune.forecast(model_name_or_path="x", learning_rat=1)


def test_forecast_of_a_built_trainer_equals_the_run(tiny_folder, persona_file, tokenizer, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    import foretune
    from foretune.models.head import untie_head
    from foretune.training.trainer import PreferenceTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.requires_grad_(False)
    untie_head(model)
    rows = load_dataset("json", data_files=str(persona_file), split="train")
    options = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 5, "learning_rate": 0.003}
    args = DPOConfig(str(tmp_path / "run"), save_strategy="no", logging_steps=5, disable_tqdm=True, **options)
    trainer = PreferenceTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    folder = foretune.forecast(trainer, observe_pairs=100)
    forecast = [
        row
        for row in folder.read_table("forecast").to_pylist()
        if row["method"] == "simulated_run" and row["trained_on"] == "mixture" and row["behaviour"] == "all"
    ]
    trainer.train()
    from foretune.models.encoding import encode
    from foretune.scores import pair_scores

    numbered = [{**row, "pair_id": index, "weight": 1.0} for index, row in enumerate(rows)]
    pairs = list(encode(numbered, tokenizer, split="train", max_length=1024))
    start = pair_scores(AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), pairs)
    end = pair_scores(trainer.model.eval(), pairs)
    margin = ((end.chosen - start.chosen) - (end.rejected - start.rejected)).mean()
    assert forecast[-1]["step"] == 5
    assert forecast[-1]["margin"] == pytest.approx(float(margin), rel=0.01)


def write(path: Path, rows: list[dict] | str | bytes) -> Path:
    if isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return path


GOOD = [{"prompt": f"Q{i}?", "chosen": " Yes", "rejected": " No", "behaviour": "b"} for i in range(8)]
BAD_DATA = {
    "a missing column": ([{"prompt": "Q", "good": "a"}], "good"),
    "empty data": ("", "no rows"),
    "no usable row": ([{**GOOD[0], "chosen": ""}, {**GOOD[0], "chosen": " No"}], "2"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n', "UTF-8"),
    "broken JSON": ('{"prompt": "Q", "chosen"\n', "line 1"),
    "a behaviour called all": ([{**row, "behaviour": "all"} for row in GOOD], "rename it"),
    "a negative weight": ([{**row, "weight": -1.0} for row in GOOD], "weight"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_ends_with_a_sentence_and_code_2(kind, tiny_folder, tmp_path, capsys):
    content, said = BAD_DATA[kind]
    path = write(tmp_path / "bad.jsonl", content)
    assert run("audit", *command(tiny_folder, path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "foretune: " in error and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dataset_name", "/nowhere/at/all.jsonl"), "/nowhere/at/all.jsonl"),
        (("--model_name_or_path", "/nowhere/model"), "/nowhere/model"),
        (("--model_name_or_path", "missing.gguf"), "missing.gguf"),
        (("--behaviour_column", "topc"), "topc"),
        (("--behaviours", "gardning"), "gardening"),
        (("--loss_type", "aot"), "aot"),
        (("--truncation_mode", "keep_end"), "keep_start"),
        (("--dtype", "float8"), "float8"),
        (("--max_length", "3"), "--max_length"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--learning_rate", "fast"), "learning_rate"),
        (("--no_such_flag", "1"), "no_such_flag"),
    ],
)
def test_bad_arguments_end_with_a_sentence_and_code_2(flags, said, tiny_folder, persona_file, tmp_path, capsys):
    assert run("forecast", *command(tiny_folder, persona_file, tmp_path / "run"), *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_prompts_that_merge_with_their_responses_are_told(tiny_folder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "long " * 90, "chosen": "a", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--max_length", "40", "--test_fraction", "0")
    assert run("audit", *command(tiny_folder, path, tmp_path / "run"), *flags) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "is left of 2: the prompts of 1 fill the 40 tokens" in said and "; the prompts of 1 are empty or merge" in said
    )


def test_odd_behaviours_are_reported_not_fatal(tiny_folder, tmp_path, capsys):
    rows = [
        *(
            {"prompt": f"Only yes {i}", "chosen": " Yes", "rejected": " No", "behaviour": "one-class"}
            for i in range(12)
        ),
        {"prompt": "Alone", "chosen": " Yes", "rejected": " No", "behaviour": "one-row"},
        *(
            {
                "prompt": f"Mixed {i}",
                "chosen": [" Yes", " No"][i % 2],
                "rejected": [" No", " Yes"][i % 2],
                "behaviour": "fine",
            }
            for i in range(12)
        ),
        {"prompt": "long " * 400, "chosen": " Yes", "rejected": " No", "behaviour": "fine"},
        {"prompt": "empty", "chosen": "", "rejected": " No", "behaviour": "fine"},
    ]
    out = tmp_path / "run"
    assert run("forecast", *command(tiny_folder, write(tmp_path / "odd.jsonl", rows), out)) == 0
    table = {
        row["behaviour"]: row for row in load_run(out).read_table("behaviours").to_pylist() if row["split"] == "train"
    }
    assert np.isnan(table["one-class"]["distinguishability"]) and np.isnan(table["one-row"]["distinguishability"])
    assert table["fine"]["distinguishability"] > 0
    kinds = {row["finding"] for row in load_run(out).read_table("findings").to_pylist()}
    assert {"one_class", "too_few", "data_empty", "data_too_long"} <= kinds


def test_a_shard_damaged_after_the_audit_is_computed_again(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder, ignore=shutil.ignore_patterns("checkpoint-*", "observations"))
    shard = folder / "features" / "states-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    stages = {name: stage for name, stage in finished.stages.items() if name == "audit"}
    RunFolder(folder).update_record(stages=stages)
    assert run("forecast", "--output_dir", str(folder)) == 0
    assert load_run(folder).read_table("forecast").equals(finished.read_table("forecast"))


@pytest.mark.parametrize(
    "verb, missed, cut",
    [
        ("audit", "pairs.parquet", "behaviours.parquet"),
        ("forecast", "forecast.parquet", "forecast_pairs.npz"),
        ("train", "observed_pairs.npz", "observed.parquet"),
    ],
)
def test_tables_that_are_missing_or_damaged_are_written_again_by_their_verb(
    verb, missed, cut, finished, tmp_path, capsys
):
    again = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, again.path)
    (again.path / missed).unlink()
    (again.path / cut).write_bytes((again.path / cut).read_bytes()[:-20])
    assert run("verify", "--output_dir", str(again.path)) == 2
    assert f"foretune {verb} --output_dir" in capsys.readouterr().err
    assert run(verb, "--output_dir", str(again.path)) == 0
    assert run("verify", "--output_dir", str(again.path)) == 0
    changed = differences(finished, again)
    assert {table for table, _ in changed} == {"behaviours", "pairs", "forecast", "observed"}
    assert max(changed.values()) < 1e-9
    assert names_of_checkpoints(again) == names_of_checkpoints(finished)


def names_of_checkpoints(run_folder):
    return sorted(path.name for path in run_folder.path.glob("checkpoint-*"))


def test_a_damaged_configuration_is_written_again_by_the_verb_with_its_arguments(
    finished, tiny_folder, persona_file, tmp_path, capsys
):
    run_folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, run_folder.path)
    (run_folder.path / "config.yaml").write_text("a: [1")
    assert run("forecast", "--output_dir", str(run_folder.path)) == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert run("audit", *command(tiny_folder, persona_file, run_folder.path)) == 0
    assert run("forecast", "--output_dir", str(run_folder.path)) == 0
    assert "forecast: already in the run folder" in capsys.readouterr().err


def test_broken_weights_are_named(tiny_folder, persona_file, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "broken")
    assert run("audit", *command(tmp_path / "broken", persona_file, tmp_path / "run")) == 2
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(tiny_folder, persona_file, tmp_path, monkeypatch, capsys):
    import errno

    import foretune.features.store as store

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    assert run("audit", *command(tiny_folder, persona_file, tmp_path / "run")) == 2
    assert "free some space" in capsys.readouterr().err


def test_verify_without_training_says_what_to_run(tiny_folder, persona_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("audit", *command(tiny_folder, persona_file, out)) == 0
    assert run("verify", "--output_dir", str(out)) == 2
    assert "foretune forecast" in capsys.readouterr().err
    assert run("verify", "--output_dir", str(tmp_path / "nothing")) == 2


def test_help_and_unknown_verbs(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert run() == 2
    assert run("frecast") == 2
    assert "unknown verb" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_lists_its_arguments(verb, capsys):
    assert run(verb, "--help") == 0
    assert f"usage: foretune {verb}" in capsys.readouterr().out


def test_help_begins_with_our_own_arguments_and_lists_trls_when_asked(capsys):
    assert run("forecast", "--help") == 0
    short = capsys.readouterr().out
    assert run("forecast", "--help_all") == 0
    everything = capsys.readouterr().out
    assert "--twin_pairs N" in short and "--weight_column TEXT" in short and "Default: 0.2." in short
    assert "--lr_scheduler_type" not in short and "--lr_scheduler_type" in everything and "--twin_pairs" in everything
    assert run("compare", "--help") == 0
    assert "--methods" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; import foretune, foretune.cli.main as m; m.usage(); print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "trl", "numpy", "plotly", "datasets"} & set(modules)


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_when_torch_is_loaded_its_threads_are_told_not_to_wait_long_on_a_core(given, spins):
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from foretune.cli.main import main; main(['audit', '--dataset_name', 'bundled:statements'])"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=unset | given, check=True)
    assert found.stdout.split() == [spins]


def test_no_garbage_is_searched_among_what_was_imported(finished):
    code = (
        "import atexit, gc; from foretune.cli.main import main\n"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects())))\n"
        f"main(['report', '--output_dir', {str(finished.path)!r}, '--format', 'card'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "True True"


def test_the_report_needs_no_torch(finished):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"from foretune.cli.main import main; main(['report', '--output_dir', {str(finished.path)!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "moment", ["features/states-00000.safetensors", "forecast.parquet", "observations/step-00000004.npy"]
)
def test_a_killed_run_continues_with_the_same_numbers(moment, finished, tiny_folder, persona_file, tmp_path):
    """SIGKILL once a given file appears; the same command again must end like the run that was never killed."""
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "foretune", "demo", *command(tiny_folder, persona_file, out)]
    options = ("--use_peft", "False", "--lr_scheduler_type", "linear", "--warmup_steps", "0", "--observe_pairs", "50")
    arguments += [*options, "--num_train_epochs", "3"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while process.poll() is None and not (out / moment).exists() and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    again = subprocess.run(arguments, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for name in ("behaviours", "forecast", "observed"):
        left, right = finished.read_table(name), RunFolder(out).read_table(name)
        for column in ("distinguishability", "loss", "margin"):
            if column in left.column_names:
                np.testing.assert_allclose(
                    np.array(left[column].to_pylist(), float), np.array(right[column].to_pylist(), float), atol=2e-5
                )


def test_metrics_reach_tensorboard_trackio_and_wandb(tiny_folder, persona_file, tmp_path):
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {
        "model_name_or_path": str(tiny_folder),
        "dataset_name": str(persona_file),
        "output_dir": str(tmp_path / "run"),
        "report_to": ["tensorboard", "trackio", "wandb"],
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_peft": True,
        "draws": 20,
        "dtype": "float32",
        "disable_tqdm": True,
        "env": {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    arguments = [sys.executable, "-m", "foretune", "train", "--config", "job.yaml"]
    ended = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)  # trackers read their folders once
    assert ended.returncode == 0, ended.stderr
    (events,) = tmp_path.glob("**/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"train/rewards/margins/sailing", "eval/rewards/margins/sailing", "train/num_pairs/gardening"} <= tags
    assert {"train/observed_train_rewards/margins/sailing", "train/displacement/chosen/gardening"} <= tags
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(tmp_path.glob("trackio/*.db"))
