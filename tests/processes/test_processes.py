"""Audit, forecast and training on 2 and 3 processes give the numbers of one; a process that dies ends the rest."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.processes.launching import environment, launch, launch_by_hand

from foretune.records import RunFolder

# 12 rows a step, however they are divided: rows of a process × accumulated batches, by number of processes
DIVIDED = {1: (2, 6), 2: (2, 3), 3: (2, 2)}


def command(count: int, model: Path, data: Path, out: Path, *more: str) -> list[str]:
    rows, accumulated = DIVIDED[count]
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--dtype", "float32", "--draws", "50", "--observations", "4", "--disable_tqdm", "True"),
        *("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulated)),
        *("--learning_rate", "0.003", "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1"),
        *("--dataloader_drop_last", "True", *more),
    ]


PLAIN = ("--use_peft", "False", "--lr_scheduler_type", "linear", "--warmup_steps", "0")
ARGUMENTS = {
    "unembedding": (*PLAIN, "--trainable", "unembedding"),
    "full": (*PLAIN, "--trainable", "full", "--forecast_alone", "False", "--learning_rate", "0.0005"),
}
ARGUMENTS["sharded"] = ARGUMENTS["full"]
# what `accelerate launch --use_fsdp --fsdp_version 2` sets
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def finished(tiny_folder, weighted_file, tmp_path_factory):
    """Finished runs by (processes, what is trained), made when they are first asked for."""
    made = {}

    def run(count: int, trainable: str) -> RunFolder:
        if (count, trainable) not in made:
            out = tmp_path_factory.mktemp("runs") / f"{count}-{trainable}"
            arguments = command(count, tiny_folder, weighted_file, out, *ARGUMENTS[trainable])
            ended = launch(count, "demo", *arguments, **(FSDP2 if trainable == "sharded" else {}))
            assert ended.returncode == 0, ended.stderr
            assert ended.stdout.count("report: ") == 1
            made[count, trainable] = RunFolder(out)
        return made[count, trainable]

    return run


# the last with its parameters divided over the processes, in the pass over the pairs and in training
RUNS = [(2, "unembedding"), (3, "full"), (2, "sharded")]


@pytest.mark.parametrize(("count", "trainable"), RUNS)
def test_same_numbers_as_one_process(count, trainable, finished):
    one, several = finished(1, trainable.replace("sharded", "full")), finished(count, trainable)
    for file in sorted((one.path / "features").rglob("states-*.safetensors")):
        assert file.read_bytes() == (several.path / file.relative_to(one.path)).read_bytes(), file
    scale = nats(one)
    for name in ("behaviours", "pairs", "forecast", "observed"):
        left, right = one.read_table(name), several.read_table(name)
        for column in left.column_names:
            values = [table[column].to_pylist() for table in (left, right)]
            if str(left.schema.field(column).type) == "double":
                # the end of a band is the forecast and 2.34 standard deviations of five runs that round
                each = 1e-5 if column.endswith(("_low", "_high")) else 1e-6
                atol = each * (scale if name == "observed" and column not in ("loss", "reward_accuracy") else 1)
                np.testing.assert_allclose(*np.array(values, float), atol=atol, rtol=each, err_msg=f"{name}.{column}")
            else:
                assert values[0] == values[1], column
    weights = [load_file(run.path / "model.safetensors") for run in (one, several)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=1e-6, err_msg=name)


def test_several_processes_divide_the_looks_on_the_way_and_at_the_end(tiny_folder, weighted_file, tmp_path):
    flags = ("--use_peft", "True", "--lora_target_modules", "q_proj", "v_proj", "--lora_dropout", "0", "--lora_r", "4")
    flags += ("--relinearise_every", "2", "--twin_pairs", "5", "--observe_pairs", "20", "--band_runs", "0")
    flags += ("--test_fraction", "0")
    flags += ("--optim", "sgd", "--learning_rate", "0.02")  # Adam makes steps of rounding where gradients begin at 0
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        ended = launch(count, "forecast", *command(count, tiny_folder, weighted_file, out, *flags))
        assert ended.returncode == 0, ended.stderr
        found.append(RunFolder(out).read_arrays("forecast_pairs"))
    for name in ("margins", "missed"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5 * np.abs(found[0]["margins"]).max())
    assert (found[0]["missed"] != 0).any()


@pytest.mark.parametrize(("count", "trainable"), RUNS)
def test_same_metrics_as_one_process(count, trainable, finished):
    one = finished(1, trainable.replace("sharded", "full"))
    histories = [history(run) for run in (one, finished(count, trainable))]
    assert any("num_pairs/rare" in entry for entry in histories[0])
    scale = nats(one)
    for before, after in zip(*histories, strict=True):
        assert before.keys() == after.keys()
        for key in before.keys() - BY_MICRO_BATCH:
            if before["step"] == 1 and "accuracies" in key:
                continue  # the signs of margins that are 0 but for rounding
            atol = 1e-6 * (1 if key in ("loss", "grad_norm", "learning_rate") else scale)
            assert after[key] == pytest.approx(before[key], abs=atol, rel=2e-6 if key == "grad_norm" else 1e-6), key


def nats(run: RunFolder) -> float:
    """The size of the float32 log-probabilities that margins, rewards and displacements are differences of."""
    return max(-value for value in run.read_table("pairs")["reference_chosen_logp"].to_pylist())


# TRL averages these over the tokens of a micro-batch first, and counts a gathered batch as one
BY_MICRO_BATCH = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens"}


def history(run: RunFolder) -> list[dict]:
    state = json.loads((run.path / "checkpoint-6/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry or "observed_train_num_pairs/rare" in entry]


LOST = "another process of this run stopped"


def test_a_process_that_dies_ends_the_rest_and_the_run_continues(tiny_folder, weighted_file, tmp_path):
    """Killed in the feature pass, then again in training; the last batch of an epoch is not whole here."""
    out = tmp_path / "run"
    arguments = [*command(3, tiny_folder, weighted_file, out, *ARGUMENTS["unembedding"]), "--forecast_alone", "False"]
    arguments += ["--dataloader_drop_last", "False", "--per_device_train_batch_size", "3", "--observe_pairs", "60"]
    killed = launch(3, "--die", "1:shard", "demo", *arguments)
    assert killed.returncode != 0
    assert killed.stderr.count(LOST) == 1 and "foretune/" not in killed.stderr
    finished = {file: file.stat().st_mtime_ns for file in out.glob("features/*.safetensors")}
    assert finished and list(out.glob("features/*.partial"))

    ended = launch_by_hand(3, "--die", "2:step", "demo", *arguments)
    assert [code for code, _ in ended] == [1, 1, -9]
    assert sum(text.count(LOST) for _, text in ended) == 1
    assert not any("Traceback" in text for _, text in ended)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert not list(out.glob("features/*.partial"))
    forecast = (out / "forecast.parquet").stat().st_mtime_ns

    again = launch(3, "demo", *arguments)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stderr
    assert (out / "forecast.parquet").stat().st_mtime_ns == forecast
    found = RunFolder(out).read_json("verification.json")
    assert found["margin_r2"] > 0.99999 and found["margin_slope"] == pytest.approx(1, abs=1e-4)
    assert RunFolder(out).record["forecast"]["batch_size"] == 3 * 2 * 3


STOPPED_TWICE = """
import threading, time
from foretune import processes

asked = []

def slow_for_the_first():
    asked.append(None)
    if len(asked) == 1:
        time.sleep(1)
        return True
    return False

processes.first_to_speak = slow_for_the_first
threading.Timer(0.3, processes.stop, ("by a signal",), {"code": 143}).start()
processes.stop("by a broken connection", code=1)
"""


def test_a_process_stopped_by_a_signal_and_a_broken_connection_still_speaks():
    variables = environment(RANK="1", WORLD_SIZE="2")
    ended = subprocess.run([sys.executable, "-c", STOPPED_TWICE], capture_output=True, text=True, env=variables)
    assert (ended.returncode, ended.stderr) == (1, "foretune: by a broken connection\n")


def test_a_mistake_is_said_once(tiny_folder, weighted_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Q", "good": "a"}\n')
    arguments = command(2, tiny_folder, bad, tmp_path / "run")
    ended = launch_by_hand(2, "audit", *arguments)
    assert [code for code, _ in ended] == [2, 2]
    assert sum(text.count("foretune: ") for _, text in ended) == 1
