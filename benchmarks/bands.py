"""How far real runs from other seeds lie apart, beside the spread that a forecast's band is made of.

The run of `what_if.py` on eight persona behaviours of each mixture, forecast with RUNS runs of the band and really
trained from SEEDS seeds. Criterion, fixed before the first run: the 90 % band allows for nine in ten of the differences
between losses of two real seeds (which vary √2 times as much as a loss).

    OMP_NUM_THREADS=2 python benchmarks/bands.py --data ../shared/data
"""

import argparse
import os
from itertools import combinations, product
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
    simulated: dict[str, dict[str, np.ndarray]] = {}
    for seed, mixture in product(range(SEEDS), MIXTURES):
        names, file = rows_of(mixture, options.data, options.work / mixture)
        if mixture not in simulated:
            simulated[mixture] = {name: spread_of(forecast(file, name), names) for name in FORECASTS}
        own = result["mixtures"].setdefault(mixture, {"losses": {}})
        losses = losses_of(prepare(job(file.parent / f"seed-{seed}", file, seed=seed)))
        own["losses"][seed] = {name: round(losses[name], 5) for name in names}
        if seed:
            real = np.array([[*found.values()] for found in own["losses"].values()])
            own["forecasts"] = {name: beside(spread, real) for name, spread in simulated[mixture].items()}
            write("bands", result)
            print(seed, mixture, own["forecasts"], flush=True)


def forecast(file: Path, name: str) -> RunFolder:
    """The run folder of one of FORECASTS, with bands."""
    folder = file.parent / name.replace(" ", "-")
    prepared = prepare(job(folder, file, relinearise_every=FORECASTS[name], band_runs=RUNS))
    return forecast_prepared(prepared, Progress.silent())


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
        if not len(pairs):  # the same seed each time
            return np.nan, np.nan
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
