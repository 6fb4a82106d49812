"""Where features would cost as much as the run, the run itself is trained: its curves are the forecast.

No simulation is as right, and `foretune train` finds the run done.
"""

import numpy as np

from foretune.dynamics.curves import learning_order
from foretune.dynamics.forecast import Forecast
from foretune.objectives import SidedObjective
from foretune.records import RunFolder
from foretune.verbs.forecast import forecast_key, section_of
from foretune.verbs.prepare import Prepared, Stopwatch
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import OF_FORECASTS
from foretune.verbs.train import train_prepared
from foretune.verbs.twin import measured_pairs

NOTE = (
    "This run reads no more rows than a forecast of it would: it is really trained, and the curves are its own. "
    "--relinearise_every 0 makes a forecast from features all the same, for `foretune what_if` and `foretune verify`."
)


def run_is_cheaper(prepared: Prepared) -> bool:
    """Whether one pass over the pairs that a forecast measures reads as many rows as the run, which is still to come.

    Not where a forecast's own arguments ask for one.
    """
    job = prepared.job
    if job.twin == "output_layer" or OF_FORECASTS & set(job.explicit) or job.run.stage_key("train") is not None:
        return False
    scores = 1 + isinstance(prepared.objective, SidedObjective)
    rows = job.num_steps(prepared.num_train_units) * job.rows_per_step
    return scores * len(measured_pairs(prepared)) >= rows


def run_instead(prepared: Prepared, progress: Progress) -> RunFolder:
    """Train the run and write its curves as the forecast."""
    run = prepared.job.run
    progress.say(f"forecast: {NOTE}")
    watch = Stopwatch()
    train_prepared(prepared, progress)
    curves, arrays = run.need_table("observed").to_pylist(), run.need_arrays("observed_pairs")
    rows = [{"method": "real_run", "trained_on": "mixture", **row} for row in curves]
    steps, margins = arrays["steps"].tolist(), arrays["margins"]
    missed = np.zeros(margins.shape[1])
    order = learning_order(rows, split="train")
    result = Forecast(rows, steps, margins, None, order, run.record["train"]["steps"], [], missed, None)
    run.write_table("forecast", rows)
    run.write_arrays("forecast_pairs", **arrays, missed=missed)
    section = section_of(prepared, result, watch, pilot_steps=result.num_steps)
    section |= {"what_is_forecast": "the run itself, really trained", "anchors": {}, "cost": 1.0, "notes": [NOTE]}
    # which pairs are observed is known since the audit, which training makes first
    run.finish_stage("forecast", key=forecast_key(prepared), seconds=watch.seconds, forecast=section)
    return run
