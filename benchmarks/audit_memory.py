"""Memory of `foretune audit` against the number of pairs: it should not grow.

Makes preference files of N pairs of free text, of many behaviours and of one, audits each in a process of its own with
a small random Llama, and samples the process's resident memory ten times a second.

    python benchmarks/audit_memory.py --pairs 2000 20000 100000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import machine
from scaling import random_model
from transformers import AutoTokenizer

from foretune.models.load import resolve_name

BEHAVIOURS = 50
VOCABULARY = 1000
WORDS = (
    "garden river winter letter market window simple honest quiet distant children science music history travel answer "
    "question reason morning evening kitchen mountain village island machine picture story doctor teacher farmer bread "
    "paper silver wooden careful bright gentle sudden narrow famous useful modern ancient curious patient ready"
).split()


def write_pairs(path: Path, count: int, behaviours: int) -> None:
    """A preference file of `count` pairs: prompts of a dozen words, answers of a few."""
    generator = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = {
                "prompt": f"{index}: tell me about the {words(8, 16)}.",
                "chosen": f" A {words(1, 3)}",
                "rejected": f" No {words(1, 3)}",
                "behaviour": f"behaviour-{index % behaviours:02d}",
            }
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """A random Llama of two layers; its tokenizer is the embedded one, trained anew on few words."""
    embedded = AutoTokenizer.from_pretrained(resolve_name("smollm2-135m")[0])
    tokenizer = embedded.train_new_from_iterator([" ".join(WORDS)] * 10, vocab_size=VOCABULARY)
    random_model("64x2", vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident(pid: int) -> tuple[int, int] | None:
    """(anonymous, file-backed) resident bytes of a process; None when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return (found["Anonymous"], found["Rss"] - found["Anonymous"]) if "Rss" in found else None


def highest(pid: int) -> int:
    """The most that was ever resident of a process, in bytes, as the kernel counts it; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def audit(folder: Path, model: Path, count: int, behaviours: int, sketch_dim: int) -> dict:
    """Audit `count` pairs in a process and watch it."""
    data, out = folder / "pairs.jsonl", folder / f"run-{count}-{behaviours}"
    write_pairs(data, count, behaviours)
    command = [
        *(sys.executable, "-m", "foretune", "audit", "--model_name_or_path", str(model), "--dtype", "float32"),
        *("--dataset_name", str(data), "--output_dir", str(out), "--sketch_dim", str(sketch_dim)),
    ]
    start, samples, peak = time.perf_counter(), [], 0
    said = folder / "said.txt"
    with said.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            if found := resident(process.pid):
                samples.append((time.perf_counter() - start, _stage(out, said), *found))
            peak = max(peak, highest(process.pid))
            time.sleep(0.1)
    assert process.returncode == 0, said.read_text()
    data.unlink()
    return {
        "pairs": count,
        "behaviours": behaviours,
        "seconds": round(time.perf_counter() - start, 1),
        "peak": peak,
        **_figures(samples),
    }


def _stage(out: Path, said: Path) -> str:
    if (out / "behaviours.parquet").exists():
        return "write"
    if "statistics" in said.read_text():
        return "statistics"
    return "features" if (out / "features").is_dir() else "prepare"


def _figures(samples: list[tuple[float, str, int, int]]) -> dict:
    """Resident memory in bytes, as sampled: of the whole process at its end, and in each stage."""
    stages = {}
    for stage in dict.fromkeys(sample[1] for sample in samples):
        own = [sample for sample in samples if sample[1] == stage]
        stages[stage] = {
            "seconds": round(own[-1][0] - own[0][0], 1),
            "peak": max(anonymous + mapped for _, _, anonymous, mapped in own),
            "peak_anonymous": max(anonymous for _, _, anonymous, _ in own),
            "last_anonymous": own[-1][2],
            "last_file_backed": own[-1][3],
        }
    return {
        "peak_anonymous": max(stage["peak_anonymous"] for stage in stages.values()),
        "settled": samples[-1][2] + samples[-1][3],
        "stages": stages,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2000, 20000, 100000])
    parser.add_argument("--behaviours", type=int, nargs="+", default=[BEHAVIOURS, 1])
    parser.add_argument("--sketch_dim", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/audit_memory.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model)
        for behaviours in given.behaviours:
            for count in given.pairs:
                run = audit(Path(scratch), model, count, behaviours, given.sketch_dim)
                print(json.dumps(run))
                keep(given.output, run, given.sketch_dim)


def keep(output: Path, run: dict, sketch_dim: int) -> None:
    """Put a run among those kept, in place of an earlier one of the same size."""
    runs = json.loads(output.read_text())["runs"] if output.exists() else []
    runs = [old for old in runs if (old["pairs"], old["behaviours"]) != (run["pairs"], run["behaviours"])] + [run]
    runs.sort(key=lambda run: (-run["behaviours"], run["pairs"]))
    result = {
        "criterion": "peak of the largest within 10 % of the smallest",
        "growth": growth(runs),
        "runs": runs,
        "sketch_dim": sketch_dim,
        "machine": machine(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def growth(runs: list[dict]) -> list[dict]:
    """From the smallest to the largest run of each kind: ratio of the peaks, and bytes a pair between them."""
    found = []
    for behaviours in dict.fromkeys(run["behaviours"] for run in runs):
        own = [run for run in runs if run["behaviours"] == behaviours]
        first, last = own[0], own[-1]
        added = max(last["pairs"] - first["pairs"], 1)
        found.append(
            {
                "behaviours": behaviours,
                "pairs": [first["pairs"], last["pairs"]],
                **{
                    f"{name}_ratio": round(last[name] / first[name], 3)
                    for name in ("peak", "peak_anonymous", "settled")
                },
                "peak_bytes_a_pair": round((last["peak"] - first["peak"]) / added),
            }
        )
    return found


if __name__ == "__main__":
    main()
