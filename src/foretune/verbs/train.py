"""`train`: the real run, with TRL, every behaviour measured on the way."""

import shutil
from typing import Any

import numpy as np

from foretune import processes
from foretune.dynamics.curves import curve_rows
from foretune.errors import UserError
from foretune.objectives import DPO, Objective, RankingLoss, RankingObjective, SidedObjective
from foretune.records import RunFolder
from foretune.training.observer import BehaviourObserver
from foretune.verbs.audit import audit_prepared
from foretune.verbs.divergence import divergence
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, Stopwatch, loss_of_pairs, prepare
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import observed_margins, run_trainer, training_key, training_settings
from foretune.verbs.revise import revise


def train(job: Job | None = None, *, progress: Progress | None = None, **arguments: Any) -> RunFolder:
    """Train with TRL's DPOTrainer, or the trainer of another `method`, and write what every behaviour did.

    Args:
        job: a resolved job, or None to build one from `arguments`.
        progress: where progress is shown; None: nowhere (TRL's own bars and logs follow `--disable_tqdm`).
        **arguments: TRL's and foretune's arguments.

    Returns:
        The run folder, with observed.parquet and the trained model. A run that was killed continues from its last
        checkpoint and gives the same numbers.

    Raises:
        UserError: anything wrong with arguments, data or model; a folder that holds another run's checkpoints.
    """
    job = job or job_from(**arguments)
    return train_prepared(prepare(job), progress or Progress.silent())


def train_prepared(prepared: Prepared, progress: Progress) -> RunFolder:
    """The same with data and model in memory; does nothing where the run folder has this training already."""
    run = audit_prepared(prepared, progress)
    watch, job = Stopwatch(), prepared.job
    key = training_key(prepared)
    if run.is_finished("train", key):
        progress.say("train: already in the run folder.")
        return run
    if run.stage_key("train") == key and (kept := _kept(run, key)):
        progress.say("train: already in the run folder, its tables are written again.")
        _write_observations(prepared, run, kept)
        return run
    for share in sorted(job.ours.forecast_at or []):
        revise(prepared, share, progress)
    trainer, observer = run_trainer(prepared, progress)
    trainer.save_model(str(run.path))
    _write_observations(prepared, run, observer)
    spent = divergence(prepared, trainer.model)
    processes.on_main(lambda: shutil.rmtree(run.path / "rows", ignore_errors=True))
    run.finish_stage(
        "train",
        key=key,
        seconds=watch.seconds,
        train={
            "trainable": job.trainable,
            "steps": trainer.state.global_step,
            "seconds": watch.seconds,
            "divergence": spent,
            "training": training_settings(job),
            "notes": _notes(job),
        },
    )
    trainer.end()
    return run


def _kept(run: RunFolder, key: str) -> BehaviourObserver | None:
    """What was observed of a finished training whose tables were damaged; None where that is gone as well.

    Training again from an earlier checkpoint would give the same, and take longer.
    """
    if (run.read_json("training.json") or {}).get("key") != key:
        return None
    observer = BehaviourObserver([])
    for file in sorted((run.path / "observations").glob("step-*.npy")):
        observer.observations[int(file.stem.removeprefix("step-"))] = np.load(file)
    return observer if {0, run.record["train"]["steps"]} <= set(observer.observations) else None


def _write_observations(prepared: Prepared, run: RunFolder, observer: BehaviourObserver) -> None:
    steps = sorted(observer.observations)
    scores = np.stack([observer.observations[step] for step in steps])
    displacement = scores - scores[0]
    reference, margins, chosen = observed_margins(prepared, observer, steps)
    members, (objective, reference_free) = prepared.observed, _loss_shown(prepared)
    loss = loss_of_pairs(prepared, objective)
    rows = curve_rows(
        steps,
        margins,
        prepared.behaviour_of[members],
        prepared.split_of[members],
        loss.within(members) if isinstance(loss, RankingLoss) else loss,
        reference_margin=reference,
        reference_free=reference_free,
        weights=prepared.weights[members],
        also={"chosen_displacement": chosen, "rejected_displacement": displacement[:, 1]},
    )
    run.write_table("observed", rows)
    run.write_arrays(
        "observed_pairs",
        pair_id=prepared.pairs.pair_id[members],
        steps=np.array(steps),
        margins=margins,
    )


def _loss_shown(prepared: Prepared) -> tuple[Objective | SidedObjective | RankingObjective, bool]:
    """The loss that observed curves are drawn in, and whether it knows no reference.

    The run's own where it is a function of a pair's scores, else DPO's.
    """
    try:
        return prepared.objective, not prepared.job.convention.reference
    except UserError:
        return DPO(beta=prepared.job.training.beta), False


def _notes(job: Job) -> list[str]:
    try:
        job.objective()
    except UserError:
        return [f"Losses shown are DPO's; the run was trained with {' + '.join(job.losses)}."]
    return []
