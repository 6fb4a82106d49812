"""`audit`: read the data and the model once, and say what the data will teach how strongly."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from foretune import processes
from foretune.dynamics.curves import ALL
from foretune.errors import UserError
from foretune.features.probes import Probes, probe
from foretune.features.store import ShardStore
from foretune.features.unembedding import PairFeatures, measure_pairs, open_store, read_features
from foretune.findings import AnswerCounts, Evidence, find_all
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of, versions
from foretune.statistics.behaviours import (
    Measured,
    YesNoFeatures,
    alignments,
    behaviour_rows,
    training_kernel,
)
from foretune.statistics.herding import representative_rank
from foretune.statistics.priority import equal_rate_mixture, initial_rates
from foretune.statistics.rankings import measured_rankings
from foretune.verbs.answers import answers_of
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, Stopwatch, prepare, template_hash, tokenizer_hash
from foretune.verbs.progress import Progress
from foretune.verbs.stand_ins import stand_ins

PREVIEW = 300
SIDES = ("prompt", "chosen", "rejected")
FIGURES = ("reference_chosen_logp", "reference_rejected_logp", "reference_margin", "alignment", "representative_rank")
RANKING = ("ranking", "chosen_rank", "rejected_rank")


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
    if run.is_finished("audit", key, *["config.yaml"] * job.replayable):
        progress.say("audit: already in the run folder.")
        return run
    processes.check_same("data or weights", key)
    write_command(job)
    probes = processes.together(lambda: probe(prepared.loaded.model, prepared.pairs))[0]
    notes = [*prepared.data.info.notes, *probes.notes, *_of_other_data(prepared)]
    if prepared.sample is not None:
        notes.append(f"{len(prepared.sample)} of {len(prepared.pairs)} pairs are audited; the others have stand-ins.")
    for note in notes:
        progress.say(note)
    features = features_of(prepared, progress, probes.packed)
    processes.on_main(lambda: _write_audit(prepared, features, probes, notes, watch, progress))
    assert processes.wait_until(lambda: run.stage_key("audit") == key)
    return run


def _of_other_data(prepared: Prepared) -> list[str]:
    """What to know where rows are no pairs."""
    contrasts = prepared.contrasts
    if prepared.unpaired:
        return [
            "Unpaired rows: what is called pairs are rows of one response. Margins are the score of a desirable one, "
            "and less that of an undesirable one; output accuracy says nothing of them, and displacement counts the "
            "response that a row lacks as 0."
        ]
    if contrasts is None:
        return []
    sizes = (contrasts.ranks > 0).sum(1)
    tied = sum(len(np.unique(ranks[:size])) < size for ranks, size in zip(contrasts.ranks, sizes, strict=True))
    size = f"{sizes.min()}" if np.ptp(sizes) == 0 else f"{sizes.min()} to {sizes.max()}"
    return [
        f"{len(sizes)} rankings of {size} responses, {tied} of them with ties: what is called pairs are rankings, and "
        "figures are means over all pairs of a ranking that are not tied."
    ]


def _write_audit(
    prepared: Prepared, features: PairFeatures, probes: Probes, notes: list[str], watch: Stopwatch, progress: Progress
) -> None:
    job, run, every = prepared.job, prepared.job.run, prepared
    prepared = prepared.audited
    progress.say("statistics …")
    measured = measure(every, features)
    kernel = training_kernel(measured)
    behaviours = behaviour_rows(measured, kernel, draws=job.ours.draws, seed=job.training.seed)
    alignment, rank = (_of_pairs(prepared, values) for values in (alignments(measured), representative_rank(measured)))
    answers = AnswerCounts()
    run.write_table("behaviours", behaviours)
    run.write_table("pairs", _pair_rows(every, features, (alignment, rank), answers))
    evidence = Evidence(behaviours, finding_columns(prepared, alignment), answers, prepared.counts, kernel)
    run.write_table("findings", [finding._asdict() for finding in find_all(evidence)])
    run.finish_stage(
        "audit",
        key=audit_key(prepared),
        seconds=watch.seconds,
        foretune_version=versions()["foretune"],
        provenance=provenance_of(every),
        data={**prepared.data.info.as_dict(), "counts": prepared.counts},
        audit={
            "answers": _answertexts_of(prepared),
            "kernel": kernel._asdict(),
            "initial_rates": dict(zip(kernel.behaviours, initial_rates(kernel).tolist(), strict=True)),
            "equal_rate_mixture": dict(zip(kernel.behaviours, equal_rate_mixture(kernel).tolist(), strict=True)),
            "probes": probes._asdict(),
            "notes": notes,
        },
    )


def write_command(job: Job) -> None:
    """Keep the command of the latest verb: config.yaml to replay it, and as flags in the record."""
    if job.replayable:
        job.run.write_yaml("config.yaml", job.explicit)
    job.run.update_record(command=job.command)


def features_key(prepared: Prepared) -> str:
    """Everything the feature pass depends on."""
    dtype = str(prepared.loaded.model.dtype)
    return sha256_of(prepared.weights_sha256, dtype, prepared.audited.pairs_sha256, prepared.job.ours.sketch_dim)


def audit_key(prepared: Prepared) -> str:
    """Everything the audit depends on."""
    ours = prepared.job.ours
    return sha256_of(features_key(prepared), ours.draws, prepared.job.training.seed, prepared.counts)


def store_of(prepared: Prepared) -> ShardStore:
    """The feature shards of a job."""
    return open_store(prepared.job.run.path, features_key(prepared))


def features_of(prepared: Prepared, progress: Progress, packed: bool | None = None) -> PairFeatures:
    """The features of all pairs that are audited; shards that are missing or damaged are computed.

    Args:
        prepared: the job.
        progress: where a bar is shown.
        packed: whether prompts can be computed once; None: as the audit found.
    """
    store, pairs = store_of(prepared), prepared.audited.pairs
    if packed is None:
        packed = bool(prepared.job.run.record["audit"]["probes"]["packed"])
    with progress.bar("features", len(pairs)) as advance:
        measure_pairs(
            prepared.loaded.model,
            pairs,
            store,
            sketch_dim=prepared.job.ours.sketch_dim,
            packed=packed,
            progress=advance,
        )
    features = read_features(store, len(pairs))
    if not np.isfinite(features.chosen_logp + features.rejected_logp).all():
        raise UserError(
            "the model gives log-probabilities that are not finite: try --dtype float32, or check its weights."
        )
    return features


def reference_margins(prepared: Prepared, features: PairFeatures) -> np.ndarray:
    """Chosen less rejected score of each pair under the reference, by the convention of the job's loss, shape (n,).

    A pair that was not audited has that of its stand-in.
    """
    log_probs = np.stack([features.chosen_logp, features.rejected_logp])
    margins = prepared.job.convention.margins(log_probs, prepared.audited.lengths)
    return _of_all(prepared, margins)


def reference_scores(prepared: Prepared, features: PairFeatures) -> np.ndarray:
    """The same of the margin and of the chosen response's own score, summed over tokens, shape (2, n)."""
    chosen, rejected = features.chosen_logp, features.rejected_logp
    return _of_all(prepared, np.stack([chosen - rejected, chosen]))


def _of_all(prepared: Prepared, values: np.ndarray) -> np.ndarray:
    return values if prepared.sample is None else values[..., stand_ins(prepared, prepared.audited_places)]


def measure(prepared: Prepared, features: PairFeatures) -> Measured:
    """Features of the audited pairs with each one's preferred answer where its behaviour has two.

    Of rankings, one row a ranking.
    """
    weights, prepared = audited_weights(prepared), prepared.audited
    answer, shared = answers_of(prepared.pairs)
    found = Measured(
        prepared.behaviour_of,
        prepared.split_of,
        weights,
        answer,
        features.first_state,
        features.chosen_mean,
        features.rejected_mean,
        features.sketch,
        YesNoFeatures(features.first_state, answer) if shared else features.sketch,
        prepared.pairs.pair_id,
    )
    contrasts = prepared.contrasts
    return found if contrasts is None else measured_rankings(found, *contrasts)


def audited_weights(prepared: Prepared) -> np.ndarray:
    """Row weights of the audited pairs, mean 1 over training pairs or rankings.

    Those of a behaviour and split weigh together what all its pairs do: what is sampled is the run of all rows.
    """
    if prepared.sample is None:
        return prepared.weights
    sample = prepared.audited
    found, group, train = sample.weights, sample.behaviour_of, sample.pairs.is_train
    weights, all_groups, all_train = prepared.weights, prepared.behaviour_of, prepared.pairs.is_train
    once, all_once = (own.units == own.pairs.pair_id for own in (sample, prepared))  # a ranking counts once
    for name, is_train in product(np.unique(group), (True, False)):
        own = (group == name) & (train == is_train)
        total = weights[(all_groups == name) & (all_train == is_train) & all_once].sum()
        if (read := found[own & once].sum()) > 0:
            found[own] *= total / read
    return found / found[train & once].mean()


def _of_pairs(prepared: Prepared, values: np.ndarray) -> np.ndarray:
    """What was measured, at each pair: a ranking's value at each of its contrasts."""
    contrasts = prepared.contrasts
    return values if contrasts is None else np.repeat(values, (contrasts.members >= 0).sum(1))


def _answertexts_of(prepared: Prepared) -> list[str] | None:
    answer, shared = answers_of(prepared.pairs)
    if not shared:
        return None
    pair = prepared.pairs[0]
    texts = [
        prepared.loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    return texts if answer[0] == 0 else texts[::-1]


def _pair_rows(
    prepared: Prepared, features: PairFeatures, found: tuple[np.ndarray, np.ndarray], answers: AnswerCounts
) -> Iterator[dict[str, Any]]:
    """Rows of pairs.parquet. Of a pair that was not audited scores, alignment and rank (`found`) are unknown."""
    known = np.full((len(FIGURES), len(prepared.pairs)), np.nan)
    margins = features.chosen_logp - features.rejected_logp
    known[:, prepared.audited_places] = np.stack([features.chosen_logp, features.rejected_logp, margins, *found])
    return pair_rows(prepared, dict(zip(FIGURES, known, strict=True)), answers)


def pair_rows(prepared: Prepared, figures: Mapping[str, np.ndarray], answers: AnswerCounts) -> Iterator[dict[str, Any]]:
    """Rows of pairs.parquet, one by one; the answers of the training pairs are counted on the way.

    Args:
        prepared: the job.
        figures: columns by name, shape (n,) each; NaN where unknown.
        answers: where answers are counted.
    """
    pairs = prepared.pairs
    for index, row in enumerate(texts_of(prepared)):
        behaviour, texts = pairs.names[pairs.behaviour[index]], {side: preview(row[side]) for side in SIDES}
        if pairs.is_train[index]:
            answers.add(behaviour, texts["chosen"], texts["rejected"])
        yield {
            "pair_id": int(pairs.pair_id[index]),
            **{name: int(row[name]) for name in RANKING if name in row},
            "behaviour": behaviour,
            "split": "train" if pairs.is_train[index] else "test",
            **texts,
            **{f"{side}_tokens": int(pairs.lengths[index, place]) for place, side in enumerate(SIDES)},
            "truncated": bool(pairs.truncated[index]),
            **{name: _number(values[index]) for name, values in figures.items()},
            "weight": float(pairs.weight[index]),
        }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def texts_of(prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Prompt, chosen and rejected of each pair, in the order of the pairs, and what places it in a ranking."""
    for split in ("train", "test"):
        if (rows := prepared.rows(split)) is not None:
            yield from rows.select_columns([*SIDES, *(name for name in RANKING if name in rows.column_names)])


def finding_columns(prepared: Prepared, alignment: np.ndarray) -> dict[str, np.ndarray]:
    """What findings read of the training pairs."""
    train, pairs = prepared.train_pairs, prepared.pairs
    return {
        "behaviour": pairs.behaviour_of[train],
        "chosen_tokens": pairs.lengths[train, 1],
        "rejected_tokens": pairs.lengths[train, 2],
        "alignment": alignment[train],
    }


def preview(content: Any) -> str:
    """The beginning of a text or conversation, for a table."""
    text = content if isinstance(content, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in content)
    return text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"


def provenance_of(prepared: Prepared) -> dict[str, Any]:
    """What the figures were computed from."""
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
        "data_sha256": prepared.pairs_sha256,
        "seed": job.training.seed,
        "device": name,
        "processes": processes.count(),
    }
