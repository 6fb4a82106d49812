"""Pair gradients of LoRA matrices against dattri-llm, bergson and a loop over pairs, on real preference data.

Criteria, fixed before the first run: at least 3 times as fast as the fastest of the three, and peak memory at most 1.25
times that of the forward and backward pass alone plus the gradients themselves.

Each method runs in a process of its own, on the same pairs, parameters and dtype, at the better of two batch sizes.
They take turns within a round, and ratios are medians over rounds. Peers are installed apart, without what they do not
need here (benchmarks/README.md), and their environment is given:

    python benchmarks/pair_gradients.py --data ../shared/data --peer_python ../peers/bin/python
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import harness
import torch
from harness import machine, times_faster
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from foretune.data import load_preferences
from foretune.features.pair_gradients import trainable_names
from foretune.models.encoding import encode
from foretune.models.load import load_model, resolve_name

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
SOURCES = {"persona": "persona", "hh": "hh/harmless-base-test.jsonl.gz"}
BUDGETS = [512, 2048]
PARTS = ("agreement", "race", "memory")
CHECKED = 4
WORKER = Path(__file__).with_name("pair_gradients_worker.py")


class Worker:
    """A method in its own process."""

    def __init__(self, method: str, python: str, job: Path, dtype: str) -> None:
        command = [python, str(WORKER), method, str(job), dtype]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.started = self._answer()

    def ask(self, **request: object) -> dict:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise SystemExit(answer["error"])
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended without an answer"}


def write_job(folder: Path, data: Path, counts: dict[str, int]) -> dict:
    """Encode the pairs and draw the adapters; B is not zero, so that A has gradients."""
    loaded = load_model("smollm2-135m")
    pairs = {}
    for name, count in counts.items():
        rows = list(load_preferences(str(data / SOURCES[name]), test_fraction=0.0).train)
        drawn = random.Random(0).sample(rows, count)
        members = encode(drawn, loaded.tokenizer, split="train", max_length=512)
        pairs[name] = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in members]
    torch.manual_seed(0)
    model = get_peft_model(loaded.model, LoraConfig(**LORA))
    adapters = {}
    for name in trainable_names(model):
        own = model.get_parameter(name).detach()
        adapters[name] = torch.randn_like(own) * 0.02 if "lora_B" in name else own.clone()
    save_file(adapters, folder / "adapters.safetensors")
    job = {"model": resolve_name("smollm2-135m")[0], "lora": LORA, "pairs": pairs}
    (folder / "job.json").write_text(json.dumps(job))
    shape = {
        name: {
            "num_pairs": len(rows),
            "mean_tokens": {
                part: sum(len(row[i]) for row in rows) / len(rows)
                for i, part in enumerate(("prompt", "chosen", "rejected"))
            },
        }
        for name, rows in pairs.items()
    }
    return {"data": shape, "num_parameters": sum(own.numel() for own in adapters.values())}


def agreement(workers: dict[str, Worker], folder: Path, data: str) -> dict[str, float]:
    """Relative distance of each method's gradients of a few pairs from those of a loop in float64."""
    found = {}
    exact = Worker("loop", sys.executable, folder, "float64")
    for name, worker in {**workers, "exact": exact}.items():
        path = folder / f"{name}.safetensors"
        worker.ask(data=data, budget=BUDGETS[0], count=CHECKED, save=str(path))
        parts = load_file(path)
        found[name] = torch.cat([parts[key].double() for key in sorted(parts)], 1)
    exact.close()
    expected = found.pop("exact")
    return {name: float((own - expected).norm() / expected.norm()) for name, own in found.items()}


def race(workers: dict[str, Worker], data: str, rounds: int, budgets: list[int], earlier: dict) -> dict:
    """Seconds of each method, round by round, each at its best batch size, added to those of an `earlier` race."""
    best = dict(earlier.get("best_budget", {}))
    for name, worker in workers.items():
        if name in best:
            worker.ask(data=data, budget=best[name], count=CHECKED)  # warm-up
            continue
        options = budgets if name != "loop" else budgets[:1]  # a loop has no batches
        tried = {option: worker.ask(data=data, budget=option)["seconds"] for option in options}
        best[name] = min(tried, key=lambda option: tried[option])
    methods = {name: partial(worker.ask, data=data, budget=best[name]) for name, worker in workers.items()}
    seconds = harness.race(methods, rounds=rounds, earlier=earlier.get("seconds"), warm_up=False)
    faster = times_faster(seconds, "foretune")
    return {
        "seconds": seconds,
        "best_budget": best,
        "times_faster_than": faster,
        "times_faster_than_fastest": min(found["median"] for found in faster.values()),
    }


def compare(folder: Path, dtype: str, sources: list[str], given: argparse.Namespace, earlier: dict) -> dict:
    """Agreement and speed of all methods that can be imported, by data set."""
    python = {"dattri-llm": given.peer_python, "bergson": given.peer_python}
    names = ("foretune", "dattri-llm", "bergson", "loop")
    workers = {name: Worker(name, python.get(name, sys.executable), folder, dtype) for name in names}
    missing = {name: own.started["error"] for name, own in workers.items() if "error" in own.started}
    workers = {name: worker for name, worker in workers.items() if name not in missing}
    found = {}
    for data in sources:
        found[data] = {"missing": missing}
        if "agreement" in given.parts:
            found[data]["distance_from_float64"] = agreement(workers, folder, data)
        if "race" in given.parts:
            found[data] |= race(workers, data, given.rounds, given.budgets, earlier.get(data, {}) if given.add else {})
    for worker in workers.values():
        worker.close()
    return found


def memory(job: Path, dtype: str, data: str, budget: int) -> dict[str, float]:
    """Peak resident memory, MB, of one batch: pair gradients and the bare pass, each in a fresh process."""
    peaks = {}
    size = 0
    for method in ("foretune", "pass"):
        worker = Worker(method, sys.executable, job, dtype)
        answer = worker.ask(data=data, budget=budget)
        peaks[method] = answer["peak"]
        size = max(size, answer["gradient_bytes"])
        worker.close()
    return {
        "pair_gradients_mb": peaks["foretune"] / 1e6,
        "pass_mb": peaks["pass"] / 1e6,
        "gradients_mb": size / 1e6,
        "ratio": (peaks["foretune"] - size) / peaks["pass"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--peer_python", default=sys.executable, help="an environment that has the peers")
    parser.add_argument("--persona_pairs", type=int, default=64)
    parser.add_argument("--hh_pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="add rounds to the recorded ones, instead of starting anew")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="tokens of a batch to choose from")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/pair_gradients.json"))
    given = parser.parse_args()
    if not given.data.is_dir():
        raise SystemExit(f"no data at {given.data}: see the docs for where the hub has it.")
    counts = {name: {"persona": given.persona_pairs, "hh": given.hh_pairs}[name] for name in given.sources}
    result = json.loads(given.output.read_text()) if given.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = write_job(folder, given.data, counts)
        result |= {
            "criteria": {"times_faster_than_fastest": ">= 3", "memory_ratio": "<= 1.25"},
            "num_parameters": job["num_parameters"],
            "lora": LORA,
            "machine": machine(),
        }
        for dtype in given.dtypes:
            found = result.setdefault(dtype, {})
            if set(given.parts) & {"agreement", "race"}:
                for data, entry in compare(folder, dtype, list(counts), given, found).items():
                    found[data] = found.get(data, {}) | job["data"][data] | entry
            if "memory" in given.parts:
                for data in counts:
                    found[data] = found.get(data, {}) | {"memory": memory(folder, dtype, data, 2048)}
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({dtype: result[dtype]}, indent=1))


if __name__ == "__main__":
    main()
