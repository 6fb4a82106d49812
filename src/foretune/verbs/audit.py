"""`audit`: read the data and the model once, and say what the data will teach how strongly."""

from typing import Any

import numpy as np

from foretune.dynamics.curves import ALL
from foretune.errors import UserError
from foretune.features.probes import Probes, probe
from foretune.features.store import ShardStore
from foretune.features.unembedding import PairFeatures, measure_pairs, open_store
from foretune.findings import Evidence, find_all
from foretune.records import RunFolder
from foretune.records.provenance import pairs_hash, sha256_of, versions
from foretune.statistics.behaviours import (
    Measured,
    alignments,
    answers_of,
    behaviour_rows,
    training_kernel,
    yes_no_features,
)
from foretune.statistics.priority import equal_rate_mixture, initial_rates
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, Stopwatch, prepare, template_hash, tokenizer_hash
from foretune.verbs.progress import Progress

PREVIEW = 300


def audit(job: Job | None = None, *, progress: Progress | None = None, **arguments: Any) -> RunFolder:
    """Measure distinguishability, priority and the behaviour kernel; write them with all findings.

    Args:
        job: a resolved job, or None to build one from `arguments`.
        progress: where progress is shown; None: nowhere.
        **arguments: TRL's and foretune's arguments, e.g. `model_name_or_path="smollm2-135m"`,
            `dataset_name="bundled:statements"`, `output_dir="run"`.

    Returns:
        The run folder, with behaviours.parquet, pairs.parquet, findings.parquet, features/ and record.json.

    Raises:
        UserError: anything wrong with arguments, data or model.
    """
    job = job or job_from(**arguments)
    return audit_prepared(prepare(job), progress or Progress.silent())


def audit_prepared(prepared: Prepared, progress: Progress) -> RunFolder:
    """The same with data and model in memory; does nothing where the run folder has this audit already."""
    if ALL in prepared.behaviour_of:
        raise UserError(
            f"a behaviour is called '{ALL}', which stands for all behaviours together: rename it in the data."
        )
    watch, job, run = Stopwatch(), prepared.job, prepared.job.run
    key = audit_key(prepared)
    if run.stage_key("audit") == key:
        progress.say("audit: already in the run folder.")
        return run
    write_command(job)
    probes = probe(prepared.loaded.model, prepared.pairs)
    notes = [*prepared.data.info.notes, *probes.notes]
    for note in notes:
        progress.say(note)
    features = _pass(prepared, store_of(prepared), probes, progress)
    progress.say("statistics …")
    measured = measure(prepared, features)
    kernel = training_kernel(measured)
    behaviours = behaviour_rows(measured, kernel, draws=job.ours.draws, seed=job.training.seed)
    pairs = _pair_rows(prepared, features, alignments(measured))
    run.write_table("behaviours", behaviours)
    run.write_table("pairs", pairs)
    evidence = Evidence(behaviours, pairs, prepared.counts, kernel)
    run.write_table("findings", [finding._asdict() for finding in find_all(evidence)])
    run.finish_stage(
        "audit",
        key=key,
        seconds=watch.seconds,
        foretune_version=versions()["foretune"],
        provenance=_provenance(prepared),
        data={**prepared.data.info.as_dict(), "counts": prepared.counts},
        audit={
            "answers": _answer_texts(prepared),
            "kernel": kernel._asdict(),
            "initial_rates": dict(zip(kernel.behaviours, initial_rates(kernel).tolist(), strict=True)),
            "equal_rate_mixture": dict(zip(kernel.behaviours, equal_rate_mixture(kernel).tolist(), strict=True)),
            "probes": probes._asdict(),
            "notes": notes,
        },
    )
    return run


def write_command(job: Job) -> None:
    """Keep the command of the latest verb: config.yaml to replay it, and as flags in the record."""
    if job.replayable:
        job.run.write_yaml("config.yaml", job.explicit)
    job.run.update_record(command=job.command)


def features_key(prepared: Prepared) -> str:
    """Everything the feature pass depends on."""
    dtype = str(prepared.loaded.model.dtype)
    return sha256_of(prepared.weights_sha256, dtype, pairs_hash(prepared.pairs), prepared.job.ours.sketch_dim)


def audit_key(prepared: Prepared) -> str:
    """Everything the audit depends on."""
    ours = prepared.job.ours
    return sha256_of(features_key(prepared), ours.draws, prepared.job.training.seed, prepared.counts)


def store_of(prepared: Prepared) -> ShardStore:
    """The feature shards of a job."""
    return open_store(prepared.job.run.path, features_key(prepared))


def measure(prepared: Prepared, features: PairFeatures) -> Measured:
    """Features as plain arrays, with each pair's preferred answer where its behaviour has two."""
    answer, shared = _answers(prepared)
    kernel_features = yes_no_features(features.first_state, answer) if shared else features.sketch
    return Measured(
        prepared.behaviour_of,
        prepared.split_of,
        prepared.weights,
        answer,
        features.first_state,
        features.chosen_mean,
        features.rejected_mean,
        features.sketch,  # pyright: ignore
        kernel_features,  # pyright: ignore
    )


def _answers(prepared: Prepared) -> tuple[np.ndarray, bool]:
    """Each pair's preferred answer (0, 1; −1: free text), and whether all behaviours share one pair of answers."""
    tokens = [(tuple(pair.chosen_ids), tuple(pair.rejected_ids)) for pair in prepared.pairs]
    answer, offered = np.full(len(tokens), -1), []
    for behaviour in np.unique(prepared.behaviour_of):
        members = np.flatnonzero(prepared.behaviour_of == behaviour)
        numbers = answers_of([tokens[index] for index in members])
        offered.append(numbers)
        if numbers is not None:
            answer[members] = [numbers[tokens[index][0]] for index in members]
    return answer, offered[0] is not None and all(numbers == offered[0] for numbers in offered)


def _answer_texts(prepared: Prepared) -> list[str] | None:
    answer, shared = _answers(prepared)
    if not shared:
        return None
    pair = prepared.pairs[0]
    texts = [
        prepared.loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    return texts if answer[0] == 0 else texts[::-1]


def _pass(prepared: Prepared, store: ShardStore, probes: Probes, progress: Progress) -> PairFeatures:
    with progress.bar("features", len(prepared.pairs)) as advance:
        features = measure_pairs(
            prepared.loaded.model,
            prepared.pairs,
            store,
            sketch_dim=prepared.job.ours.sketch_dim,
            packed=probes.packed,
            progress=advance,
        )
    if not np.isfinite(features.chosen_logp + features.rejected_logp).all():
        raise UserError(
            "the model gives log-probabilities that are not finite: try --dtype float32, or check its weights."
        )
    return features


def _pair_rows(prepared: Prepared, features: PairFeatures, alignment: np.ndarray) -> list[dict[str, Any]]:
    texts = {
        row["pair_id"]: row
        for rows in (prepared.data.train, prepared.data.test)
        if rows is not None
        for row in rows.select_columns(["pair_id", "prompt", "chosen", "rejected"])
    }
    rows = []
    for index, pair in enumerate(prepared.pairs):
        chosen, rejected = float(features.chosen_logp[index]), float(features.rejected_logp[index])
        rows.append(
            {
                "pair_id": pair.pair_id,
                "behaviour": pair.behaviour,
                "split": pair.split,
                **{side: _preview(texts[pair.pair_id][side]) for side in ("prompt", "chosen", "rejected")},
                "prompt_tokens": len(pair.prompt_ids),
                "chosen_tokens": len(pair.chosen_ids),
                "rejected_tokens": len(pair.rejected_ids),
                "truncated": pair.truncated,
                "reference_chosen_logp": chosen,
                "reference_rejected_logp": rejected,
                "reference_margin": chosen - rejected,
                "alignment": float(alignment[index]) if np.isfinite(alignment[index]) else None,
                "weight": pair.weight,
            }
        )
    return rows


def _preview(content: Any) -> str:
    text = content if isinstance(content, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in content)
    return text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"


def _provenance(prepared: Prepared) -> dict[str, Any]:
    import torch

    loaded, job = prepared.loaded, prepared.job
    device = loaded.model.device
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "versions": versions(),
        "model": {
            "name": loaded.name,
            "architecture": type(loaded.model).__name__,
            "num_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "note": loaded.note,
            "sha256": prepared.weights_sha256,
        },
        "tokenizer_sha256": tokenizer_hash(loaded),
        "template_sha256": template_hash(loaded),
        "data_sha256": pairs_hash(prepared.pairs),
        "seed": job.training.seed,
        "device": name,
    }
