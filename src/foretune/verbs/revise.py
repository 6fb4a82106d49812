"""Forecasts of the rest of a run, made while it trains."""

import shutil
from typing import Any

from foretune import processes
from foretune.dynamics.curves import ALL
from foretune.dynamics.forecast import Forecast
from foretune.records.provenance import sha256_of
from foretune.verbs.forecast import forecast_key, lineariser_of, simulated
from foretune.verbs.job import job_from
from foretune.verbs.prepare import Prepared
from foretune.verbs.progress import Progress

FOLDER = "revisions"
FIGURES = ("loss", "reward_accuracy", "margin", "loss_low", "loss_high")


def revise(prepared: Prepared, share: float, progress: Progress) -> None:
    """Train up to a share of the steps, forecast the rest, and add the forecast of the end to record.json.

    The section `revisions` lists, in the order of their steps: step, share of all steps, key, and
    `end`: loss, reward accuracy, margin and the loss's 90 % band of each behaviour and split at the last step. The
    forecast made before training is left as it is. Does nothing where the record has this revision already.

    Raises:
        UserError: the run folder's training is past that step; a loss that cannot be forecast.
    """
    job = prepared.job
    settings = {name: value for name, value in job.explicit.items() if name not in ("forecast_at", "forecast_alone")}
    revised = prepared._replace(job=job_from(**{**settings, "pilot_fraction": share}))
    key = sha256_of(forecast_key(revised))
    known = [entry for entry in job.run.record.get("revisions", []) if entry["share"] != share or entry["key"] == key]
    if any(entry["share"] == share for entry in known):
        return
    lineariser = lineariser_of(revised, progress, folder=FOLDER)
    problem, result = simulated(revised, revised.objective, progress, lineariser, folder=FOLDER)
    assert problem.past is not None
    entry = {"step": problem.past.num_steps, "share": share, "key": key, "end": _end(result)}
    known = sorted([*known, entry], key=lambda entry: entry["share"])
    processes.on_main(lambda: job.run.update_record(revisions=known))
    processes.on_main(lambda: shutil.rmtree(job.run.path / FOLDER, ignore_errors=True))


def _end(result: Forecast) -> list[dict[str, Any]]:
    return [
        {name: row.get(name) for name in ("behaviour", "split", *FIGURES)}
        for row in result.rows
        if row["step"] == result.steps[-1]
        and (row["method"], row["trained_on"]) == ("simulated_run", "mixture")
        and row["behaviour"] != ALL
    ]
