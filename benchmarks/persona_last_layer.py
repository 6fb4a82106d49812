"""The paper's core on real data: does distinguishability say how fast each behaviour alone is learned?

The paper's setting: only the unembedding is trained, full-batch gradient descent, one-token answers Yes/No, each
behaviour alone. Criteria, fixed before the first run: Spearman(distinguishability, loss after 300 steps) ≤ −0.97 over
all behaviours; initial slope of the loss within 1 % of theory T1.

The criterion names no step size, so it is asked of several, from the paper's own (β = 0.01, learning rate 0.1) to
the largest stable one at β = 0.1 (the setting of the first run). What matters is ρ = β²λt/4, how far the run has gone
beyond linear growth (theory T3); its median over behaviours is in the table.

    python benchmarks/persona_last_layer.py --persona ../shared/data/persona
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from harness import machine
from scipy.stats import bootstrap, spearmanr

from foretune.data import load_preferences
from foretune.dynamics.bounds import linear_deviation
from foretune.dynamics.closed_form import initial_loss_rate
from foretune.dynamics.flow import gradient_descent, gradient_flow
from foretune.features.unembedding import measure_pairs, open_store, read_features
from foretune.models.encoding import encode
from foretune.models.load import load_model, resolve_dtype, weights_hash
from foretune.models.pairs import EncodedPairs
from foretune.objectives import DPO
from foretune.records.provenance import pairs_hash, sha256_of
from foretune.statistics.behaviours import yes_no_features
from foretune.statistics.distinguishability import Distinguishability, distinguishability
from foretune.statistics.samples import TwoClasses

STEPS = 300
PAPER = (0.01, 0.1)
# (β, learning rate); None: 4/(β²λ), the largest step for which theory T2 holds, over all behaviours
SETTINGS = [PAPER, (0.1, 0.003), (0.1, 0.01), (0.1, 0.03), (0.1, None)]


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
    pairs = EncodedPairs(encode(data.train, loaded.tokenizer, split="train", max_length=1024))
    store = open_store(given.cache, sha256_of(weights_hash(loaded.model), str(dtype), pairs_hash(pairs)))
    measure_pairs(loaded.model, pairs, store, sketch_dim=256, progress=lambda done: print(done, end="\r"))
    first_state = read_features(store, len(pairs)).first_state[:].astype(float)
    measured_in = time.time() - start
    yes = loaded.tokenizer(" Yes")["input_ids"][0]
    answer = np.array([0 if pair.chosen_ids[0] == yes else 1 for pair in pairs])
    behaviour_of = pairs.behaviour_of
    phi = yes_no_features(first_state, answer)
    names = [str(name) for name in np.unique(behaviour_of)]
    members = {name: behaviour_of == name for name in names}
    found = {
        name: distinguishability(TwoClasses(first_state[rows], answer[rows] == 0), draws=500)
        for name, rows in members.items()
    }
    settings = [
        train_alone(beta, rate, {name: phi[rows] for name, rows in members.items()}, found) for beta, rate in SETTINGS
    ]
    result = {
        "criteria": {"spearman_loss_300": "<= -0.97", "slope_over_T1": "1 +- 0.01"},
        "num_behaviours": len(names),
        "num_pairs": len(pairs),
        "steps": STEPS,
        "settings": settings,
        "pairs_per_second": len(pairs) / measured_in,
        "seconds": time.time() - start,
        "model": given.model,
        "dtype": str(dtype),
        "machine": machine(),
        "behaviours": [
            {
                "behaviour": name,
                "num_pairs": int(rows.sum()),
                "prefer_yes": int((answer[rows] == 0).sum()),
                **{key: float(value) for key, value in found[name]._asdict().items()},
            }
            for name, rows in members.items()
        ],
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    for setting in settings:
        print(json.dumps({key: value for key, value in setting.items() if key != "losses"}))


def train_alone(
    beta: float, rate: float | None, features: dict[str, np.ndarray], found: dict[str, Distinguishability]
) -> dict:
    """Train each behaviour alone and correlate what happened with distinguishability."""
    objective = DPO(beta=beta)
    largest = {name: np.linalg.norm(own, 2) ** 2 / len(own) for name, own in features.items()}
    rate = rate or 4 / (beta**2 * max(largest.values()))
    losses, changes, slopes = [], [], []
    for name, own in features.items():
        weights = np.ones(len(own))
        path = gradient_descent(own, weights, objective, learning_rate=rate, steps=STEPS)
        losses.append([float(objective.value(own @ path[step]).mean()) for step in (20, STEPS)])
        changes.append(float(np.linalg.norm(path[-1])))
        tiny = 1e-4 * rate
        early = gradient_flow(own, weights, objective, times=np.array([0.0, tiny]))[-1]
        # log 2 − ℓ, without losing its digits
        drop = -float(np.mean(np.log1p(np.expm1(-objective.beta * (own @ early)) / 2)))
        slopes.append(-drop / tiny / initial_loss_rate(found[name].value / np.sqrt(2), objective))
    distances = np.array([value.value for value in found.values()])
    table = np.array(losses).T
    rho = [float(linear_deviation(np.array(rate * STEPS), own, objective)) for own in features.values()]
    return {
        "beta": beta,
        "learning_rate": rate,
        "the_papers": (beta, rate) == PAPER,
        "median_rho_300": float(np.median(rho)),
        "mean_loss_300": float(table[1].mean()),
        "spearman_loss_20": with_interval(distances, table[0]),
        "spearman_loss_300": with_interval(distances, table[1]),
        "spearman_weight_change_300": with_interval(distances, np.array(changes)),
        "worst_slope_deviation": float(np.abs(np.array(slopes) - 1).max()),
        "losses": dict(zip(found, losses, strict=True)),
    }


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
