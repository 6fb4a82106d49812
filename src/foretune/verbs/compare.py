"""`compare`: several alignment methods on the same data with the same budget."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretune import processes
from foretune.errors import UserError
from foretune.records import RunFolder
from foretune.records.linking import link
from foretune.records.provenance import sha256_of
from foretune.verbs.audit import audit_prepared
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.job import Job, job_from
from foretune.verbs.losses import OF_DPO
from foretune.verbs.prepare import Prepared, prepare
from foretune.verbs.progress import Progress
from foretune.verbs.train import train_prepared
from foretune.verbs.verify import verify
from foretune.verification import MethodRun, compare_methods, order_agreement

# The arguments that make each method: of DPOTrainer, of another trainer of TRL's, or, the last three, of rankings.
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "dpo_norm": {"loss_type": ["sigmoid_norm"]},
    "rdpo": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "ipo": {"loss_type": ["ipo"]},
    "slic": {"loss_type": ["hinge"]},
    "exo": {"loss_type": ["exo_pair"], "label_smoothing": 0.001},
    "nca": {"loss_type": ["nca_pair"]},
    "bco": {"loss_type": ["bco_pair"]},
    "sppo": {"loss_type": ["sppo_hard"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "aot": {"loss_type": ["aot"]},
    "discopop": {"loss_type": ["discopop"]},
    "wpo": {"loss_type": ["sigmoid"], "use_weighting": True},
    "simpo": {"method": "simpo", "beta": 2.0},
    "cpo": {"method": "cpo"},
    "orpo": {"method": "orpo"},
    "kto": {"method": "kto"},
    "plackett_luce": {"ranking_loss": "plackett_luce"},
    "pairwise": {"ranking_loss": "pairwise"},
    "top1": {"ranking_loss": "top1"},
}


def compare(
    job: Job | None = None,
    *,
    methods: Sequence[str] = ("dpo", "ipo", "slic"),
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
    **arguments: Any,
) -> RunFolder:
    """Forecast and train each method from each seed, and lay them side by side.

    Args:
        job: a resolved job, or None to build one from `arguments`; its loss is not used.
        methods: names from METHODS.
        seeds: of the runs (order of batches, adapters, dropout; the data stay the same); None: the job's own.
        progress: where progress is shown; None: nowhere.
        **arguments: TRL's and foretune's arguments.

    Returns:
        The run folder, with comparison.json; each run is a run folder of its own in `{method}-seed{seed}/`. What is
        finished is not done again.

    Raises:
        UserError: an unknown method, or anything wrong with arguments, data or model.
    """
    check_methods(methods)
    job, progress = job or job_from(**arguments), progress or Progress.silent()
    prepared = prepare(job)
    for method in methods:
        job_from(**{**job.explicit, **METHODS[method]}).check_format(prepared.data.info.format)
    run = audit_prepared(prepared, progress)
    runs, reasons = [], {}
    for method in dict.fromkeys(methods):
        for seed in dict.fromkeys(seeds or [job.training.seed]):
            progress.say(f"{method}, seed {seed}:")
            found, reason = _run(prepared, method, seed, progress)
            runs.append(found)
            if reason:
                reasons[method] = reason
    processes.on_main(lambda: _write(run, runs, reasons))
    return run


def check_methods(methods: Sequence[str]) -> None:
    """Refuse names that no method has.

    Raises:
        UserError: such a name, or none at all.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"no method is called '{unknown[0]}': there are {', '.join(METHODS)}.")
    if not methods:
        raise UserError(f"no method is named: choose from {', '.join(METHODS)}.")


def _run(prepared: Prepared, method: str, seed: int, progress: Progress) -> tuple[MethodRun, str | None]:
    """One run, and why it could not be forecast."""
    base = prepared.job
    folder = base.run.path / f"{method}-seed{seed}"
    foreign = ("method", *OF_DPO) if "method" in METHODS[method] else ("method",)
    given = {name: value for name, value in base.explicit.items() if name not in foreign}
    settings = {**given, **METHODS[method], "seed": seed, "output_dir": str(folder)}
    own = prepared._replace(job=job_from(**settings))
    processes.on_main(lambda: _share_audit(base.run, folder))
    try:
        own.job.objective()
        reason = None
    except UserError as error:
        reason = str(error)
    if reason is None:
        processes.on_main(lambda: _share_features(base.run, seed, folder))
        forecast_prepared(own, progress)
    run = train_prepared(own, progress)
    if reason is None:
        processes.on_main(lambda: verify(run, progress=progress))
    observed = run.read_table("observed")
    assert observed is not None
    judged = None if reason else run.read_json("verification.json")
    return MethodRun(method, seed, observed.to_pylist(), run.record["train"]["divergence"], judged), reason


def _share_audit(run: RunFolder, folder: Path) -> None:
    """The audit of the same rows, in a folder of its own: features are links."""
    if (folder / "record.json").exists():
        return
    (folder / "features").mkdir(parents=True, exist_ok=True)
    for shard in run.path.glob("features/*.safetensors"):
        if not (folder / "features" / shard.name).exists():
            link(shard, folder / "features" / shard.name)
    for name in ("behaviours", "pairs", "findings"):
        shutil.copy2(run.path / f"{name}.parquet", folder / f"{name}.parquet")
    record = run.record
    stages = {"audit": record["stages"]["audit"]}
    RunFolder(folder).write_json("record.json", {**record, "stages": stages})


def _share_features(run: RunFolder, seed: int, folder: Path) -> None:
    """Features of adapters at the start, which methods with the same seed and scores share; others take their own."""
    target = folder / "features" / "step-000000"
    for known in sorted(run.path.glob(f"*-seed{seed}/features/step-000000")):
        if not target.exists():
            shutil.copytree(known, target, copy_function=link)


def _write(run: RunFolder, runs: Sequence[MethodRun], reasons: dict[str, str]) -> None:
    table = run.read_table("behaviours")
    assert table is not None
    strength = {row["behaviour"]: _strength(row) for row in table.to_pylist() if row["split"] == "train"}
    entries = compare_methods(runs, strength)
    for entry in entries:
        entry["not_forecast_because"] = reasons.get(entry["method"])
    content = {"methods": entries, "distinguishability": strength, "order_agreement": order_agreement(entries)}
    run.write_json("comparison.json", content)
    names = [(own.method, own.seed) for own in runs]
    run.finish_stage("compare", key=sha256_of(names), seconds=0.0)


def _strength(row: dict[str, Any]) -> float:
    """Distinguishability of Yes/No behaviours, else the generalised one."""
    value = row["distinguishability_debiased"]
    return row["generalised_distinguishability_debiased"] if value is None or value != value else value
