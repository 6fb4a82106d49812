"""What maximising a reward model does: proxy and held-out reward and KL, forecast and run, and over-optimisation.

No criterion: it is `foretune reward` and `foretune rlhf` on real data. Two reward models (score heads) are trained on
two halves of the same prompts; the policy's output layer maximises the first by TRL's RLOO, the second only watches.
Then the same with reward models of a prompt or two, one for each of three seeds. Finished stages are not repeated.

    OMP_NUM_THREADS=1 python benchmarks/rlhf.py --data ../shared/data
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_plan import behaviours_of, data_file
from harness import write

from foretune.records import RunFolder
from foretune.verbs.progress import Progress
from foretune.verbs.reward import reward
from foretune.verbs.rlhf import rlhf

MIXTURE, BEHAVIOURS, ROWS = "test-0", 3, 40
SHARED = {"model_name_or_path": "smollm2-135m", "test_fraction": 0.2, "disable_tqdm": True}
REWARD = {
    "trainable": "score",
    "stored_states": True,
    "forecast_alone": False,
    "learning_rate": 1e-3,
    "max_steps": 60,
    "per_device_train_batch_size": 16,
    "draws": 100,
}
POLICY = {
    "max_pairs_per_behaviour": 12,
    "trainable": "unembedding",
    "dtype": "float32",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "learning_rate": 5e-4,
    "beta": 0.02,
    "max_completion_length": 1,
    "candidates": 8,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 20,
    "observations": 6,
    "observe_pairs": 4,
}
FIGURES = ("reward", "heldout_reward", "kl")
FEW_ROWS, FEW_SEEDS = 4, (0, 1, 2)


def main() -> None:
    """Train what is missing, write results/rlhf.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-rlhf")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file = data_file(MIXTURE, ROWS, options.data, options.work)
    names = behaviours_of(MIXTURE, options.data)[:BEHAVIOURS]
    shared: dict[str, Any] = {**SHARED, "dataset_name": str(file), "behaviours": names}

    def judge(name: str, half: str, **more: Any) -> RunFolder:
        return reward(output_dir=str(options.work / name), half=half, progress=Progress(), **shared, **REWARD, **more)

    def policy(name: str, judges: dict[str, RunFolder]) -> dict[str, Any]:
        models = {"reward_model": str(judges["first"].path), "heldout_reward_model": str(judges["second"].path)}
        run = rlhf(output_dir=str(options.work / name), progress=Progress(), **shared, **POLICY, **models)
        return figures(run, judges)

    judges = {half: judge(half, half) for half in ("first", "second")}
    result = {**policy("policy", judges), "few": {"rows": FEW_ROWS, "seeds": {}}}
    for seed in FEW_SEEDS:
        poor = judge(f"few-{seed}", "first", max_pairs_per_behaviour=FEW_ROWS, seed=seed, data_seed=seed)
        result["few"]["seeds"][seed] = policy(f"policy-few-{seed}", {**judges, "first": poor})
        write("rlhf", result)


def figures(run: RunFolder, judges: dict[str, RunFolder]) -> dict[str, Any]:
    """Curves of all behaviours together, the ends of each, and how good the reward models are."""
    table = run.read_table("policy")
    assert table is not None
    rows = [row for row in table.to_pylist() if row["split"] == "test"]
    curves = {
        method: {
            name: [row[name] for row in rows if (row["method"], row["behaviour"]) == (method, "all")]
            for name in ("step", *FIGURES)
        }
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    last = max(row["step"] for row in rows)
    ends = {
        row["behaviour"]: {
            f"{when}_{name}": found[name] for when, found in _when(rows, row, last).items() for name in FIGURES
        }
        for row in rows
        if row["method"] == "observed" and row["step"] == last
    }
    said, happened = (np.array(curves[method]["reward"]) for method in ("gradient_flow", "observed"))
    return {
        "settings": {"reward": REWARD, "policy": POLICY},
        "seconds": {
            **{f"reward model, {half} half": _seconds(folder) for half, folder in judges.items()},
            "policy": _seconds(run),
        },
        "reward_accuracy": {half: _accuracy(folder) for half, folder in judges.items()},
        "curves": curves,
        "behaviours": ends,
        "overoptimised": run.record["rlhf"]["overoptimised"],
        "notes": run.record["rlhf"]["notes"],
        "reward_error": float(np.abs(said - happened).max()),
    }


def _when(rows: list[dict[str, Any]], own: dict[str, Any], last: int) -> dict[str, dict[str, Any]]:
    """First and last observation and the forecast of the last, of one behaviour."""
    wanted = {"first": ("observed", 0), "last": ("observed", last), "forecast": ("gradient_flow", last)}
    return {
        when: next(row for row in rows if (row["method"], row["step"], row["behaviour"]) == (*key, own["behaviour"]))
        for when, key in wanted.items()
    }


def _seconds(run: RunFolder) -> float:
    return round(sum(stage["seconds"] for stage in run.stages.values()), 1)


def _accuracy(run: RunFolder) -> float:
    """On held-out pairs, at the end."""
    table = run.read_table("observed")
    assert table is not None
    rows = [row for row in table.to_pylist() if (row["behaviour"], row["split"]) == ("all", "test")]
    return rows[-1]["reward_accuracy"]


if __name__ == "__main__":
    main()
