"""Behaviours trained together through TRL, unembedding only, against the forecast made before.

Criteria, fixed before the run: over all observed pairs margin R² ≥ 0.99; Spearman of the behaviours' final losses
≥ 0.98. One run with AdamW and one with SGD, minibatches, warm-up and the user's own schedule.

    python benchmarks/joint_last_layer.py --persona ../shared/data/persona
"""

import argparse
import json
from pathlib import Path

from harness import machine

from foretune.verbs.job import job_from
from foretune.verbs.progress import Progress
from foretune.verbs.run_all import run_all

RUNS = {"adamw_torch": 1e-4, "sgd": 0.1}
FIGURES = ("spearman_loss", "spearman_accuracy", "margin_r2", "margin_slope", "loss_mae", "relative_loss_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--persona", default="../shared/data/persona")
    parser.add_argument("--rows", type=int, default=40, help="training pairs of each behaviour")
    parser.add_argument("--cache", type=Path, default=Path(".cache/joint"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/joint_last_layer.json"))
    given = parser.parse_args()
    if not Path(given.persona).is_dir():
        raise SystemExit(f"no persona data at {given.persona}: see the docs for where the hub has it.")
    results = {}
    for optimiser, rate in RUNS.items():
        job = job_from(
            model_name_or_path="smollm2-135m",
            dataset_name=given.persona,
            output_dir=str(given.cache / optimiser),
            trainable="unembedding",
            optim=optimiser,
            learning_rate=rate,
            warmup_steps=10,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            max_pairs_per_behaviour=given.rows,
            test_fraction=0.1,
            observe_pairs=10,
            observations=5,
            forecast_alone=False,
            save_strategy="no",
            draws=200,
        )
        run = run_all(job, Progress())
        found = run.read_json("verification.json")
        keys = [key for key in found if key.startswith(FIGURES) or key.startswith("num_")]
        results[optimiser] = {
            "learning_rate": rate,
            **{key: found[key] for key in keys},
            "over_run": found["over_run"],
            "sentence": found["sentence"],
            "seconds": {stage: entry["seconds"] for stage, entry in run.record["stages"].items()},
            "dtype": run.record["provenance"]["model"]["dtype"],
        }
        content = {
            "criteria": {"margin_r2": ">= 0.99", "spearman_loss": ">= 0.98"},
            "runs": results,
            "machine": machine(),
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(content, indent=1) + "\n")
        print(optimiser, {key: found[key] for key in FIGURES})


if __name__ == "__main__":
    main()
