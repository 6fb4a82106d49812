"""`forecast`: what the run will do to every behaviour, before it is run."""

from typing import Any

import numpy as np
from trl import DPOTrainer

from foretune import processes
from foretune.dynamics.anchors import discard_anchors
from foretune.dynamics.closing_look import Look
from foretune.dynamics.confidence import confidence, likely_error
from foretune.dynamics.curves import ALL
from foretune.dynamics.early import early_theory
from foretune.dynamics.forecast import Forecast, ForecastProblem, flow_rows, forecast_run
from foretune.dynamics.linearised import Tangent
from foretune.dynamics.relinearise import Relinearisation
from foretune.errors import UserError
from foretune.features.pair_gradients import trainable_names
from foretune.objectives import Objective, RankingObjective, SidedObjective
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of
from foretune.scores import Convention
from foretune.statistics.behaviours import Measured
from foretune.statistics.moments import Rows
from foretune.verbs.audit import (
    audit_prepared,
    features_key,
    features_of,
    measure,
    write_command,
)
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, Stopwatch, prepare
from foretune.verbs.problems import output_layer_problem, planned_cost, twin_problem
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import training_settings
from foretune.verbs.twin import Lineariser, scalings

WHAT_IS_FORECAST = {
    "output_layer": "the output layer (unembedding), trained alone",
    "weight_space": "the trained weights, with margins linear in each layer's change",
    "tangent": "the trained parameters, with margins linear in them",
}


def forecast(job: "Job | DPOTrainer | None" = None, *, progress: Progress | None = None, **arguments: Any) -> RunFolder:
    """Forecast loss, accuracy and margin of every behaviour over the configured run.

    Args:
        job: a resolved job; or a constructed `DPOTrainer`, whose encoded data, model and arguments are taken as they
            are; or None to build a job from `arguments`.
        progress: where progress is shown; None: nowhere.
        **arguments: TRL's and foretune's arguments.

    Returns:
        The run folder, with forecast.parquet (the audit is made first if it is missing). Where features would cost as
        much as the run itself, and no argument asks for them, the run is trained and its curves are the forecast.

    Raises:
        UserError: anything wrong with arguments, data or model; a loss that cannot be forecast.
    """
    if isinstance(job, DPOTrainer):
        from foretune.verbs.from_trainer import prepared_from_trainer

        prepared = prepared_from_trainer(job, **arguments)
    else:
        job = job or job_from(**arguments)
        job.objective()  # refuse before any work
        _check_parts(job)
        prepared = prepare(job)
        from foretune.verbs.run_instead import run_instead, run_is_cheaper  # which trains, and so may forecast

        if run_is_cheaper(prepared):
            return run_instead(prepared, progress or Progress.silent())
    return forecast_prepared(prepared, progress or Progress.silent())


def forecast_prepared(prepared: Prepared, progress: Progress) -> RunFolder:
    """The same with data and model in memory; does nothing where the run folder has this forecast already."""
    objective = prepared.objective
    _check_parts(prepared.job)
    run = audit_prepared(prepared, progress)
    watch, job = Stopwatch(), prepared.job
    key = forecast_key(prepared)
    if run.is_finished("forecast", key):
        progress.say("forecast: already in the run folder.")
        return run
    write_command(job)
    progress.say("forecast: preparing …")
    lineariser = lineariser_of(prepared, progress)
    dear = _alternative(prepared, lineariser) if lineariser else []
    for note in dear:
        progress.say(note)
    problem, result = simulated(prepared, objective, progress, lineariser)
    run.write_table("forecast", result.rows)
    run.write_arrays(
        "forecast_pairs",
        pair_id=prepared.pairs.pair_id[prepared.observed],
        steps=np.array(result.steps),
        margins=result.margins,
        **({} if result.chosen is None else {"chosen": result.chosen}),
        missed=result.missed,
    )
    section = section_of(prepared, result, watch, pilot_steps=problem.past.num_steps if problem.past else 0)
    section["notes"] = _notes(job, problem)
    if lineariser:
        section |= _trust(prepared, problem, result)
        section["look_explains"] = result.look and result.look.explained
        section["cost"] = _cost(section, lineariser)
        section["notes"] += [*_doubts(section["confidence"], lineariser.renewable), *_by_heart(problem)]
        section["notes"] += _unbelieved(result.look)
    if isinstance(problem.margins, Tangent):
        section["kernel_error"] = problem.margins.kernel_error()
    section["anchors"] = lineariser.keys if lineariser else {}
    processes.on_main(lambda: discard_anchors(run.path, but=section["anchors"]))
    if problem.features is not None:
        section["theory"] = _theory(measure(prepared, features_of(prepared, progress)), problem, result)
    notes = section["notes"]
    section["notes"] = [*notes, *dear]
    run.finish_stage("forecast", key=key, seconds=watch.seconds, forecast=section)
    for note in notes:
        progress.say(note)
    return run


def _check_parts(job: Job) -> None:
    """Refuse parts of a forecast that exclude each other."""
    if job.ours.forecast_alone and job.ours.pilot_fraction:
        raise UserError(
            "--forecast_alone is of behaviours trained alone from the start, and a --pilot_fraction trains them "
            "together: leave one of the two out."
        )
    if job.ours.audit_pairs and job.twin == "output_layer":
        raise UserError(
            f"--audit_pairs {job.ours.audit_pairs}: the forecast of the output layer is of every row, exactly; leave "
            "it out, or take fewer rows with --max_pairs_per_behaviour."
        )


def lineariser_of(prepared: Prepared, progress: Progress, *, folder: str = ".") -> Lineariser | None:
    """What takes the features of a twin, kept below `folder` of the run folder; None for the output layer alone."""
    job = prepared.job
    return None if job.twin == "output_layer" else Lineariser(prepared, progress, job.run.path / folder)


def simulated(
    prepared: Prepared,
    objective: Objective | SidedObjective | RankingObjective,
    progress: Progress,
    lineariser: Lineariser | None,
    *,
    folder: str = ".",
) -> tuple[ForecastProblem, Forecast]:
    """Forecast the run of an audited job; a twin's pilot is kept below `folder` of the run folder."""
    try:
        problem = (
            twin_problem(prepared, objective, progress, lineariser, pilot_folder=f"{folder}/pilot")
            if lineariser
            else output_layer_problem(prepared, objective, progress)
        )
        result = forecast_run(problem, progress=lambda what: progress.say(f"forecast: {what} …"))
    finally:
        if lineariser:
            lineariser.leave()
    return problem, result


def _trust(prepared: Prepared, problem: ForecastProblem, result: Forecast) -> dict[str, Any]:
    """How far extrapolations between anchors were right, and what the forecast is worth for each behaviour."""
    assert isinstance(problem.renewal, Relinearisation)
    drifts = problem.renewal.drifts
    first = result.steps.index(problem.past.num_steps) if problem.past else 0
    change = result.margins[-1] - result.margins[first]
    behaviour_of = prepared.behaviour_of[prepared.observed]
    found = confidence(change, behaviour_of, drifts, beta=prepared.job.training.beta)
    return {
        "drifts": [drift._asdict() for drift in drifts],
        "confidence": {name: {"word": word, "score": score} for name, (word, score) in found.items()},
        "likely_error": likely_error([end - start for start, end in _ends(result).values()], 1 + len(drifts)),
    }


def _doubts(found: dict[str, dict[str, Any]], renewable: bool) -> list[str]:
    low = [name for name, own in found.items() if own["word"] == "low"]
    if not low:
        return []
    names = ", ".join(low[:5]) + (", …" if len(low) > 5 else "")
    how = "--relinearise_tolerance 0.2" if renewable else "--twin weight_space --relinearise_tolerance 0.2"
    return [
        f"Confidence is low for {len(low)} of {len(found)} behaviours ({names}): their margins leave the range in "
        f"which first order is good. Features taken more often ({how}) or a pilot (--pilot_fraction 0.1) follow them."
    ]


# Above this share of the run, really training answers as soon (docs/fidelity.md).
DEAR = 0.5


def _cost(section: dict[str, Any], lineariser: Lineariser) -> float:
    """Rows that went forward and backward for the forecast, over those of the run; forward alone, a row is half."""
    pilot_rows = section["pilot_steps"] * section["batch_size"]
    features = len(lineariser.keys) * lineariser.num_measured
    return (pilot_rows + features + lineariser.num_looked / 2) / (section["steps"] * section["batch_size"])


def _alternative(prepared: Prepared, lineariser: Lineariser) -> list[str]:
    cost = planned_cost(prepared, lineariser)
    if cost < DEAR:
        return []
    return [
        f"This forecast reads at least {cost:.0%} as many rows forward and backward as the run itself will: for so "
        "short a run `foretune train` answers about as soon, and exactly. Fewer --twin_pairs and --observe_pairs make "
        "it cheaper."
    ]


def _by_heart(problem: ForecastProblem) -> list[str]:
    place, rows = problem.place, problem.train_pairs
    if place is None or len(np.unique(place[rows])) == len(rows) or problem.by_heart(rows) is not None:
        return []
    return [
        "Measured pairs stand for others, and too few pairs are held out to tell what they would learn by heart: "
        "losses of free text are then forecast too low. Hold some rows out (--test_fraction 0.2), or take features on "
        "the way (--relinearise_every)."
    ]


def _unbelieved(look: Look | None) -> list[str]:
    if look is None or look.believed:
        return []
    return [
        f"Of the forecast's margins, the model with the simulated weights explains {look.explained:.0%} only: features "
        "go stale on the way. Take them more often (--relinearise_tolerance 0.2)."
    ]


def _theory(measured: Measured, problem: ForecastProblem, result: Forecast) -> dict[str, dict[str, float | list[str]]]:
    """The closed forms' figures of each behaviour alone, and the hypotheses of theirs that this run does not meet."""
    rates, found = result.learning_rates, {}
    for behaviour in np.unique(measured.behaviour_of[measured.split_of == "train"]):
        members = measured.members(behaviour, "train")
        classes = None
        if measured.two_answers(members) and measured.defined(members):
            sides = [members[measured.answer[members] == answer] for answer in (0, 1)]
            classes = Rows(measured.first_state, sides[0]), Rows(measured.first_state, sides[1])
        features = Rows(measured.kernel_features, members)
        own = early_theory(features, classes, problem.objective, time=float(np.sum(rates)), learning_rate=max(rates))
        failed = [*own.failed, *_run_failures(problem.arguments)]
        if np.ptp(measured.weights[members]) > 0:
            failed.append("rows have different weights")
        found[str(behaviour)] = own.value | {"failed_hypotheses": failed}
    return found


def _run_failures(arguments: Any) -> list[str]:
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    failed = [] if optimizer == "sgd" else [f"the optimiser is {optimizer}, not SGD"]
    return failed + ["weights decay"] * (arguments.weight_decay > 0)


def forecast_key(prepared: Prepared) -> str:
    """Everything the forecast depends on."""
    job, ours = prepared.job, prepared.job.ours
    # `explicit` holds every argument that differs from a default; output_dir and reporting change no number
    settings = {name: value for name, value in job.explicit.items() if name not in IRRELEVANT}
    observed = prepared.pairs.pair_id[prepared.observed].tolist()
    # what a trainer built in Python trains is said by its model alone
    model = prepared.loaded.model
    trained = None if job.replayable else (job.trainable, trainable_names(model), scalings(model))
    return sha256_of(
        features_key(prepared), settings, ours.alone_mass, ours.observations, observed, processes.count(), trained
    )


# Arguments that change no number of a forecast.
IRRELEVANT = {
    *("output_dir", "report_to", "run_name", "disable_tqdm", "logging_steps", "save_steps", "resume_from_checkpoint"),
    "forecast_at",
}


def section_of(prepared: Prepared, result: Forecast, watch: Stopwatch, *, pilot_steps: int) -> dict[str, Any]:
    """What record.json says of every forecast."""
    job, arguments = prepared.job, prepared.job.training
    rates = job.run.record["audit"]["initial_rates"]
    return {
        "trainable": job.trainable,
        "twin": job.twin,
        "pilot_steps": pilot_steps,
        "what_is_forecast": WHAT_IS_FORECAST[job.twin],
        "objective": f"{_loss_name(job)}, beta {arguments.beta:g}{_scores(job)}",
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "learning_rate": arguments.learning_rate,
        "scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "steps": result.num_steps,
        "batch_size": job.rows_per_step,
        "processes": processes.count(),
        "settings": job.explicit,
        "training": training_settings(job),
        "learning_order": result.order,
        "unlearned_at_first": sorted(name for name, rate in rates.items() if rate < 0),
        "unlearned_at_end": [name for name, (start, end) in _ends(result).items() if end > start],
        "seconds": watch.seconds,
    }


def _loss_name(job: Job) -> str:
    name = job.losses[0]
    return {None: name, "pairwise": f"pairwise {name}"}.get(job.ranking_loss, str(job.ranking_loss))


def _scores(job: Job) -> str:
    return f" ({job.convention})" if job.convention != Convention() else ""


def _ends(result: Forecast) -> dict[str, tuple[float, float]]:
    """The training loss of each behaviour at the first and at the last step of the joint run."""
    method = result.rows[0]["method"]
    joint = [row for row in result.rows if (row["method"], row["trained_on"]) == (method, "mixture")]
    losses = {(row["behaviour"], row["step"]): row["loss"] for row in joint if row["split"] == "train"}
    names = {name for name, _ in losses} - {ALL}
    return {name: (losses[name, 0], losses[name, result.steps[-1]]) for name in sorted(names)}


def _notes(job: Job, problem: ForecastProblem) -> list[str]:
    notes = []
    if job.twin == "output_layer" and job.trainable != "unembedding":
        notes.append(
            f"The run trains {'LoRA adapters' if job.trainable == 'lora' else 'all weights'}, the forecast is of the "
            "output layer alone: expect its order of the behaviours to hold better than its sizes."
        )
    if job.convention.per_token and job.twin == "output_layer":
        notes.append(
            f"{job.losses[0]} averages over a response's tokens: the simulated run does so too, gradient "
            "flow and closed form, whose features are of sums, are left out."
        )
    if job.ours.method == "kto":
        notes.append(
            "KTO measures scores against a KL divergence that it estimates from each batch: here that is left at 0, "
            "where to first order it changes no step."
        )
    if problem.features is not None:
        taken, trained = len(flow_rows(problem.features, problem, problem.train_pairs).pairs), len(problem.train_pairs)
        if taken < trained:
            notes.append(
                f"Gradient flow and closed form are computed from {taken} of {trained} training pairs; the simulated "
                "run takes all of them."
            )
    return notes
