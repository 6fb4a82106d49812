"""Rankings of four responses: three losses, each forecast beside its outcome.

Two data sets: the bundled rankings with LoRA, and the human preferences of FineGrainedRLHF (four answers to each
question, compared in pairs; https://github.com/allenai/FineGrainedRLHF, Apache-2.0) with the output layer alone.
Criterion for the latter, whose forecast is exact by construction: margin R² ≥ 0.99; none was fixed for the former. A
run that was stopped goes on where it was.

    python benchmarks/rankings.py --feedback ../shared/data/finegrained_rlhf/dev_feedback.json
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

from harness import RESULTS, machine

from foretune.records import load_run
from foretune.verbs.compare import compare
from foretune.verbs.job import job_from
from foretune.verbs.progress import Progress

LOSSES = ("plackett_luce", "pairwise", "top1")
COMMON = {
    "model_name_or_path": "smollm2-135m",
    "ranking_loss": "pairwise",  # of the audit; every run has its own
    "num_train_epochs": 1,
    "observations": 3,
    "forecast_alone": False,
    "band_runs": 0,
    "save_steps": 4,
    "draws": 200,
    "dtype": "float32",
}
RUNS: dict[str, dict[str, Any]] = {
    "bundled": {
        "dataset_name": "bundled:rankings",
        "trainable": "lora",
        "learning_rate": 5e-4,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 4,
        "max_pairs_per_behaviour": 8,
        "twin_pairs": 8,
        "observe_pairs": 4,
    },
    "human": {
        "trainable": "unembedding",
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "max_length": 48,
        "observe_pairs": 6,
    },
}
FIGURES = ("margin_r2", "margin_slope", "loss_mae", "relative_loss_error", "spearman_loss", "sentence")


def human_rankings(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows, in foretune's layout; of two answers 1 says that the first is better, 2 the second, 0 neither."""
    couples = list(combinations(range(4), 2))
    return [
        {
            "prompt": f"{row['question']}\n",
            "responses": [row[f"prediction {number}"] for number in range(1, 5)],
            "preferences": [
                couple if found == 1 else couple[::-1]
                for couple, found in zip(couples, row["preference"], strict=True)
                if found
            ],
        }
        for row in json.loads(path.read_text())[:count]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--feedback", type=Path, default=Path("../shared/data/finegrained_rlhf/dev_feedback.json"))
    parser.add_argument("--prompts", type=int, default=24, help="questions with human preferences")
    parser.add_argument("--data", choices=list(RUNS), nargs="+", default=list(RUNS))
    parser.add_argument("--cache", type=Path, default=Path(".cache/rankings"))
    parser.add_argument("--output", type=Path, default=RESULTS / "rankings.json")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    given.cache.mkdir(parents=True, exist_ok=True)
    for data in given.data:
        settings = {**COMMON, **RUNS[data], "output_dir": str(given.cache / data)}
        if data == "human":
            if not given.feedback.exists():
                raise SystemExit(f"no preferences at {given.feedback}: see the docs for where they are.")
            file = given.cache / "human.jsonl"
            rows = human_rankings(given.feedback, given.prompts)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings["dataset_name"] = str(file)
        run = compare(job_from(**settings), methods=LOSSES, progress=Progress())
        results[data] = {"machine": machine(), "settings": {**COMMON, **RUNS[data]}, **figures(run)}
        given.output.write_text(json.dumps(results, indent=1) + "\n")


def figures(run: Any) -> dict[str, Any]:
    """Counts of the data, and of each loss the forecast beside the outcome."""
    found: dict[str, Any] = {"counts": run.record["data"]["counts"], "losses": {}}
    for loss in LOSSES:
        own = load_run(run.path / f"{loss}-seed42")
        verified = own.read_json("verification.json")
        stages = {stage: entry["seconds"] for stage, entry in own.record["stages"].items()}
        curves = {name: _ends(own.read_table(name).to_pylist()) for name in ("forecast", "observed")}
        kept = {key: value for key, value in verified.items() if key.startswith(FIGURES)}
        found["losses"][loss] = {**kept, **curves, "seconds": stages}
    return found


def _ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last step of every behaviour and split, of the joint run."""
    last = max(row["step"] for row in rows)
    names = ("behaviour", "split", "step", "loss", "reward_accuracy", "margin", "num_pairs")
    joint = [
        row
        for row in rows
        if (row.get("method"), row.get("trained_on")) in (("simulated_run", "mixture"), (None, None))
    ]
    return [{name: row[name] for name in names} for row in joint if row["step"] in (0, last)]


if __name__ == "__main__":
    main()
