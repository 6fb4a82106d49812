"""The paper's core on real data: does distinguishability say how fast each behaviour alone is learned?

The paper's setting: only the unembedding is trained, full-batch gradient descent, one-token answers Yes/No, each
behaviour alone. Criteria, fixed before the run: Spearman(distinguishability, loss after 300 steps) ≤ −0.97 over all
behaviours; initial slope of the loss within 1 % of theory T1.

    python benchmarks/persona_last_layer.py --persona ../shared/data/persona
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, spearmanr

from foretune.data import load_preferences
from foretune.dynamics.closed_form import initial_loss_rate
from foretune.dynamics.flow import gradient_descent, gradient_flow
from foretune.features.unembedding import measure_pairs, open_store
from foretune.models.encoding import encode
from foretune.models.load import load_model, resolve_dtype, weights_hash
from foretune.objectives import DPO
from foretune.records.provenance import pairs_hash, sha256_of, versions
from foretune.statistics.behaviours import yes_no_features
from foretune.statistics.distinguishability import distinguishability
from foretune.statistics.samples import TwoClasses

STEPS, BETA = 300, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--persona", default="../shared/data/persona")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cache", type=Path, default=Path(".cache/persona"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/persona_last_layer.json"))
    given = parser.parse_args()
    if not Path(given.persona).is_dir():
        raise SystemExit(f"no persona data at {given.persona}: see the docs for where the hub has it.")
    start = time.time()
    import torch

    dtype = resolve_dtype("auto", torch.device("cpu"))
    loaded = load_model(given.model, dtype=dtype)
    data = load_preferences(given.persona, test_fraction=0.0, max_pairs_per_behaviour=given.rows)
    pairs = encode(data.train, loaded.tokenizer, split="train", max_length=1024).pairs
    store = open_store(given.cache, sha256_of(weights_hash(loaded.model), str(dtype), pairs_hash(pairs)))
    features = measure_pairs(loaded.model, pairs, store, sketch_dim=256, progress=lambda done: print(done, end="\r"))
    measured_in = time.time() - start
    yes = loaded.tokenizer(" Yes")["input_ids"][0]
    answer = np.array([0 if pair.chosen_ids[0] == yes else 1 for pair in pairs])
    behaviour_of = np.array([pair.behaviour for pair in pairs])
    # one learning rate for all: small enough for the stiffest behaviour, η ≤ 4/(β²λ) of theory T2
    rows = []
    phi = yes_no_features(features.first_state, answer)
    largest = max(
        np.linalg.norm(phi[behaviour_of == name], 2) ** 2 / (behaviour_of == name).sum()
        for name in np.unique(behaviour_of)
    )
    rate = 4 / (BETA**2 * largest)
    objective = DPO(beta=BETA)
    for name in np.unique(behaviour_of):
        members = behaviour_of == name
        found = distinguishability(TwoClasses(features.first_state[members], answer[members] == 0), draws=500)
        own, weights = phi[members], np.ones(members.sum())
        path = gradient_descent(own, weights, objective, learning_rate=rate, steps=STEPS)
        losses = [float(objective.value(own @ path[step]).mean()) for step in (0, 20, STEPS)]
        tiny = 1e-4 * rate
        early = gradient_flow(own, weights, objective, times=np.array([0.0, tiny]))[-1]
        slope = (float(objective.value(own @ early).mean()) - np.log(2)) / tiny
        balanced = initial_loss_rate(found.value / np.sqrt(2), objective)
        rows.append(
            {
                "behaviour": str(name),
                "num_pairs": int(members.sum()),
                "prefer_yes": int((answer[members] == 0).sum()),
                "distinguishability": found.value,
                "low": found.low,
                "high": found.high,
                "permutation_floor": found.floor,
                "loss_20": losses[1],
                "loss_300": losses[2],
                "weight_change_300": float(np.linalg.norm(path[-1])),
                "slope_over_T1": slope / balanced,
            }
        )
    table = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "behaviour"}
    result = {
        "criteria": {"spearman_loss_300": "<= -0.97", "slope_over_T1": "1 +- 0.01"},
        "num_behaviours": len(rows),
        "steps": STEPS,
        "beta": BETA,
        "learning_rate": rate,
        **{
            f"spearman_{key}": with_interval(table["distinguishability"], table[key]) for key in ("loss_20", "loss_300")
        },
        "spearman_weight_change_300": with_interval(table["distinguishability"], table["weight_change_300"]),
        "worst_slope_deviation": float(np.abs(table["slope_over_T1"] - 1).max()),
        "pairs_per_second": len(pairs) / measured_in,
        "seconds": time.time() - start,
        "model": given.model,
        "dtype": str(dtype),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "behaviours": sorted(rows, key=lambda row: row["loss_300"]),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("behaviours", "versions")}, indent=1))


def with_interval(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Spearman's correlation with a 95 % bootstrap interval over behaviours."""
    found = bootstrap(
        (left, right),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=0,
    ).confidence_interval
    return {"value": float(spearmanr(left, right).statistic), "low": float(found.low), "high": float(found.high)}


if __name__ == "__main__":
    main()
