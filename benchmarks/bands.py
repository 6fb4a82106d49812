"""How far real runs from other seeds lie apart, beside the same seeds simulated and the band that forecasts draw.

The run of `what_if.py` on eight persona behaviours of each mixture, forecast with RUNS runs of the band, really trained
from SEEDS seeds, and simulated from the same seeds on the forecast's features. Criterion, fixed before the first run:
the 90 % band allows for nine in ten of the differences between losses of two real seeds (which vary √2 times as much as
a loss).

    OMP_NUM_THREADS=2 python benchmarks/bands.py --data ../shared/data
"""

import argparse
import copy
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from fidelity import commit
from fidelity_figures import intervals
from harness import machine, write
from scipy.stats import t as t_distribution
from what_if import FORECASTS, STEPS, job, losses_of, rows_of

from foretune.dynamics.simulated_run import simulate_run
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.prepare import Prepared, prepare
from foretune.verbs.progress import Progress
from foretune.verbs.twin import Lineariser

MIXTURES, SEEDS, RUNS = ("tuning-0", "test-0"), 7, 12
KEYS = ("real_sd", "held", "same_seeds_sd", "correlation")


def main() -> None:
    """Forecast, train what is missing, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-bands")
    options = parser.parse_args()
    result: dict[str, Any] = {"runs": RUNS, "steps": STEPS, "machine": machine(), "commit": commit(), "mixtures": {}}
    for mixture in MIXTURES:
        names, file = rows_of(mixture, options.data, options.work / mixture)
        own = result["mixtures"][mixture] = {"behaviours": names, "losses": [], "forecasts": {}}
        for seed in range(SEEDS):
            found = losses_of(prepare(job(file.parent / f"seed-{seed}", file, seed=seed)))
            own["losses"].append([round(found[name], 5) for name in names])
        for forecast, every in FORECASTS.items():
            folder = file.parent / forecast.replace(" ", "-")
            prepared = prepare(job(folder, file, relinearise_every=every, band_runs=RUNS))
            forecast_prepared(prepared, Progress.silent())
            same = simulated_losses(prepared, names)
            own["forecasts"][forecast] = {
                "same_seeds": same.round(5).tolist(),
                **beside(spread_of(prepared, names), np.array(own["losses"]), same),
            }
            write("bands", result)
            print(mixture, forecast, {key: own["forecasts"][forecast][key] for key in KEYS}, flush=True)


def spread_of(prepared: Prepared, names: list[str]) -> np.ndarray:
    """Standard deviation of each behaviour's losses at the end in the runs of the band, shape (K,)."""
    table = prepared.job.run.read_table("forecast")
    assert table is not None
    reach = {
        row["behaviour"]: (row["loss_high"] - row["loss_low"]) / 2
        for row in table.to_pylist()
        if (row["step"], row["method"], row["trained_on"]) == (STEPS, "simulated_run", "mixture")
    }
    return np.array([reach[name] for name in names]) / (quantile() * np.sqrt(1 + 1 / RUNS))


def quantile() -> float:
    """Of Student's t, as the band takes it."""
    return float(t_distribution.ppf(0.95, RUNS - 1))


def simulated_losses(prepared: Prepared, names: list[str]) -> np.ndarray:
    """Losses at the end of simulated runs from the seeds of the real ones, on the forecast's anchors, (SEEDS, K)."""
    lineariser = Lineariser(prepared, Progress.silent(), prepared.job.run.path)
    lineariser.keys = {int(step): key for step, key in prepared.job.run.record["forecast"]["anchors"].items()}
    anchors, objective, losses = lineariser.anchors, prepared.job.objective(), []
    for seed in range(SEEDS):
        arguments = copy.copy(prepared.job.training)
        arguments.seed = seed
        run = simulate_run(
            anchors.get(0).starting_at(lineariser.drawn_anew(seed)),  # pyright: ignore
            arguments,
            objective,  # pyright: ignore
            train_pairs=prepared.train_pairs,
            weights=np.ones(len(prepared.train_pairs)),
            observed=prepared.observed,
            observations=2,
            renewal=lambda step, _: anchors.get(step),
        )
        of_pairs = objective.value(run.margins[-1])  # pyright: ignore
        behaviour_of = prepared.behaviour_of[prepared.observed]
        losses.append([of_pairs[behaviour_of == name].mean() for name in names])
    return np.array(losses)


def beside(simulated: np.ndarray, losses: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    """Figures of one forecast; intervals are bootstraps over the seeds.

    …_sd are root mean squares over behaviours of the standard deviations of final losses, in the band's runs, in real
    ones and in simulated ones from the same seeds; held: the share of differences between two real seeds that are no
    larger than nine in ten would be if losses varied as in the band's runs; correlation: of the seeds' mean losses.

    Args:
        simulated: standard deviations in the band's runs, shape (K,).
        losses: of real runs, shape (seeds, K).
        same: of simulated ones, shape (seeds, K).
    """

    def figures(drawn: list[int]) -> tuple[float, ...]:
        pairs = np.array([pair for pair in combinations(drawn, 2) if pair[0] != pair[1]])
        if not len(pairs):  # the same seed each time
            return (np.nan,) * len(KEYS)
        apart, as_simulated = (own[pairs[:, 0]] - own[pairs[:, 1]] for own in (losses, same))
        # half the mean square difference is the variance, and resampled seeds do not lessen it
        real, ours = (float(np.sqrt((own**2).mean() / 2)) for own in (apart, as_simulated))
        held = float(np.mean(np.abs(apart) <= np.sqrt(2) * quantile() * simulated))
        return real, held, ours, float(np.corrcoef(losses[drawn].mean(1), same[drawn].mean(1))[0, 1])

    seeds = [*range(len(losses))]
    return {
        "simulated_sd": float(np.sqrt(np.mean(simulated**2))),
        **dict(zip(KEYS, figures(seeds), strict=True)),
        "intervals": intervals(figures, seeds, KEYS),
    }


if __name__ == "__main__":
    main()
