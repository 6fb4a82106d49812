"""`reproduce`: test the paper's claims on a named model and data set, one page a claim."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from foretune import processes
from foretune.claims import (
    accuracy,
    collapse,
    dialogue,
    displacement,
    equal_rate,
    fine_tuning,
    label_noise,
    linear_bound,
    loss_rate,
    many_behaviours,
    misalignment,
    priority,
    representations,
    weight_change,
)
from foretune.claims.claim import Claim, NotApplicable, not_applicable, result_of
from foretune.claims.study import Study
from foretune.errors import UserError
from foretune.models.embedded import EMBEDDED_MODEL
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of
from foretune.verbs.audit import audit_prepared
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, prepare
from foretune.verbs.progress import Progress

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (
        *(weight_change, linear_bound, loss_rate, collapse, accuracy, fine_tuning, priority, representations),
        *(misalignment, dialogue, many_behaviours, label_noise, equal_rate, displacement),
    )
}
# What a reproduction takes where nothing else is said.
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": EMBEDDED_MODEL,
    "dataset_name": "bundled:statements",
    "output_dir": "reproduction",
    "max_pairs_per_behaviour": 200,
    "sketch_dim": 256,
    "draws": 200,
    "beta": 0.01,
}


DIALOGUE = "bundled:free_text"


def reproduce(
    job: Job | None = None,
    *,
    claims: Sequence[str] | None = None,
    quick: bool = False,
    dialogue_dataset_name: str | None = DIALOGUE,
    progress: Progress | None = None,
    **arguments: Any,
) -> RunFolder:
    """Test the claims of the paper (R1 … R14) with their controls.

    Args:
        job: a resolved job, or None to build one from `arguments`.
        claims: names of the claims to test; None: all.
        quick: fewer behaviours, rows and runs.
        dialogue_dataset_name: pairs with answers of several tokens, for the claims about those; None: none.
        progress: where progress is shown; None: nowhere.
        **arguments: TRL's and foretune's arguments; the embedded model and the bundled behaviours where none are named.

    Returns:
        The run folder, with claims.json; results that are there already are not computed again.

    Raises:
        UserError: an unknown claim, or anything wrong with arguments, data or model. A claim that the model or the
            data cannot show is no error: it is reported as not applicable, with the reason.
    """
    wanted = chosen_claims(claims)
    progress = progress or Progress.silent()
    job = job or job_from(**{**DEFAULTS, **arguments})
    _check(job)
    prepared = prepare(job).audited
    run = audit_prepared(prepared, progress)
    text = partial(_dialogue, prepared, dialogue_dataset_name, progress, quick) if dialogue_dataset_name else None
    study = Study(prepared, progress, quick=quick, dialogue=text)
    kept = {} if job.ours.restart else {page["claim"]: page for page in run.read_json("claims.json") or []}
    for claim in wanted:
        key = sha256_of(study.key, dialogue_dataset_name, claim.name, claim.statement)
        if kept.get(claim.name, {}).get("key") != key:
            progress.say(f"{claim.name}: {claim.title.lower()} …")
            kept[claim.name] = _tested(claim, study) | {"key": key}
            run.write_json("claims.json", [kept[name] for name in CLAIMS if name in kept])
    return run


def _check(job: Job) -> None:
    if job.losses != ["sigmoid"]:
        raise UserError(
            f"the claims are about DPO, the run's loss is {' + '.join(job.losses)}: leave out --method and --loss_type."
        )
    if processes.count() > 1:
        raise UserError(
            f"foretune reproduce runs in one process, this launch has {processes.count()}: start it without a launcher."
        )


def _dialogue(prepared: Prepared, name: str, progress: Progress, quick: bool) -> Study:
    """The study of the same model on other data, in a folder of its own."""
    job = prepared.job
    others = ("behaviour_column", "behaviours", "dataset_config", "dataset_train_split", "dataset_test_split")
    said = {key: value for key, value in job.explicit.items() if key not in others}
    folder = str(job.run.path / "dialogue")
    text = prepare(job_from(**{**said, "dataset_name": name, "output_dir": folder}), loaded=prepared.loaded).audited
    audit_prepared(text, progress)
    return Study(text, progress, quick=quick)


def chosen_claims(names: Sequence[str] | None) -> list[Claim]:
    """The claims that are called so, in their order; all for None.

    Raises:
        UserError: a name that no claim has.
    """
    unknown = [name for name in names or () if name not in CLAIMS]
    if unknown:
        raise UserError(f"no claim is called '{unknown[0]}': there are {', '.join(CLAIMS)}.")
    return [claim for name, claim in CLAIMS.items() if names is None or name in names]


def _tested(claim: Claim, study: Study) -> dict[str, Any]:
    start = time.process_time()
    try:
        return result_of(claim, claim.run(study), seconds=round(time.process_time() - start, 2))
    except NotApplicable as reason:
        return not_applicable(claim, str(reason))
