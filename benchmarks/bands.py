"""How far real runs from other seeds lie apart, beside the spread that a forecast's band is made of.

The run of `what_if.py` on eight persona behaviours of each mixture, forecast with RUNS runs of the band and really
trained from SEEDS seeds. Criterion, fixed before the first run: the 90 % band allows for nine in ten of the differences
between losses of two real seeds (which vary √2 times as much as a loss).

    OMP_NUM_THREADS=2 python benchmarks/bands.py --data ../shared/data
"""

import argparse
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

from foretune.records import RunFolder
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.prepare import prepare
from foretune.verbs.progress import Progress

MIXTURES, SEEDS, RUNS = ("tuning-0", "test-0"), 12, 12


def main() -> None:
    """Forecast, train what is missing, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-bands")
    options = parser.parse_args()
    result: dict[str, Any] = {"runs": RUNS, "steps": STEPS, "machine": machine(), "commit": commit(), "mixtures": {}}
    for mixture in MIXTURES:
        names, file = rows_of(mixture, options.data, options.work / mixture)
        spreads = {}
        for forecast, every in FORECASTS.items():
            folder = file.parent / forecast.replace(" ", "-")
            prepared = prepare(job(folder, file, relinearise_every=every, band_runs=RUNS))
            forecast_prepared(prepared, Progress.silent())
            spreads[forecast] = spread_of(prepared.job.run, names)
        result["mixtures"][mixture] = {"forecasts": {}, "losses": {}}
        for seed in range(SEEDS):
            found = losses_of(prepare(job(file.parent / f"seed-{seed}", file, seed=seed)))
            result["mixtures"][mixture]["losses"][seed] = {name: round(found[name], 5) for name in names}
            write("bands", result)
        losses = np.array([[*own.values()] for own in result["mixtures"][mixture]["losses"].values()])
        result["mixtures"][mixture]["forecasts"] = {name: beside(own, losses) for name, own in spreads.items()}
        write("bands", result)
        print(mixture, result["mixtures"][mixture]["forecasts"], flush=True)


def spread_of(run: RunFolder, names: list[str]) -> np.ndarray:
    """Standard deviation of each behaviour's simulated losses at the end, shape (K,)."""
    table = run.read_table("forecast")
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


def beside(simulated: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """Figures of one forecast; intervals are bootstraps over the real seeds.

    simulated_sd and real_sd are root mean squares over behaviours of the standard deviations of final losses; held is
    the share of differences between two seeds that are no larger than nine in ten would be if losses varied as the
    simulated ones do.

    Args:
        simulated: standard deviations, shape (K,).
        losses: of real runs, shape (seeds, K).
    """

    def figures(drawn: list[int]) -> tuple[float, float]:
        pairs = np.array([pair for pair in combinations(drawn, 2) if pair[0] != pair[1]])
        apart = losses[pairs[:, 0]] - losses[pairs[:, 1]]
        # half the mean square difference is the variance, and resampled seeds do not lessen it
        real = np.sqrt((apart**2).mean() / 2)
        return float(real), float(np.mean(np.abs(apart) <= np.sqrt(2) * quantile() * simulated))

    seeds, keys = [*range(len(losses))], ("real_sd", "held")
    return {
        "simulated_sd": float(np.sqrt(np.mean(simulated**2))),
        **dict(zip(keys, figures(seeds), strict=True)),
        "intervals": intervals(figures, seeds, keys),
    }


if __name__ == "__main__":
    main()
