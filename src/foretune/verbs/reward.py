"""`reward`: a reward model, forecast, trained by TRL, and laid beside its forecast."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import LoraConfig
from transformers import Trainer
from trl import RewardTrainer

from foretune.dynamics.curves import ALL
from foretune.findings import AnswerCounts, Evidence, find_all
from foretune.models.reward import rewards
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of, versions
from foretune.statistics.behaviours import Measured, alignments, behaviour_rows, training_kernel
from foretune.statistics.priority import equal_rate_mixture, initial_rates
from foretune.training.build import lora_config
from foretune.training.reward_trainer import ModelObserver, RewardRun, reward_rows
from foretune.training.terminal import TrainingBar, quieten
from foretune.verbs.audit import finding_columns, pair_rows, provenance_of, write_command
from foretune.verbs.prepare import Stopwatch
from foretune.verbs.progress import Progress
from foretune.verbs.reward_data import RewardData, prepare_reward
from foretune.verbs.reward_forecast import forecast_reward, head_run, reward_curves, training_key
from foretune.verbs.reward_job import RewardJob, reward_job_from
from foretune.verbs.verify import verify

ONE_COMPUTATION = "The run trained the head on stored hidden states, as the forecast does: they are one computation."


def reward(job: RewardJob | None = None, *, progress: Progress | None = None, **arguments: Any) -> RunFolder:
    """Audit, forecast, train and verify a Bradley–Terry reward model.

    Args:
        job: a resolved job, or None to build one from `arguments`.
        progress: where progress is shown; None: nowhere.
        **arguments: those of `trl reward` and foretune's.

    Returns:
        The run folder: the tables of `audit`, `forecast`, `train` and `verify` in the reward model's representation,
        the trained model, and with `ensemble` the heads of all members and ensemble.parquet.

    Raises:
        UserError: anything wrong with arguments, data or model.
    """
    job, progress = job or reward_job_from(**arguments), progress or Progress.silent()
    data, head = prepare_reward(job, progress)
    _audit(data, progress)
    forecast_reward(data, head, progress)
    _train(data, progress)
    return verify(job.run, progress=progress)


def _audit(data: RewardData, progress: Progress) -> None:
    """Distinguishability in the representation that the score head reads."""
    watch, job, run, prepared = Stopwatch(), data.job, data.job.run, data.prepared
    key = sha256_of(data.key, job.ours.draws, job.training.seed, prepared.counts)
    if run.is_finished("audit", key):
        return
    write_command(job)
    progress.say("statistics …")
    chosen, rejected = data.states.double().cpu().numpy().transpose(1, 0, 2)
    features, ids = chosen - rejected, prepared.pairs.pair_id
    free_text = np.full(len(ids), -1)
    groups = prepared.behaviour_of, prepared.split_of, prepared.weights, free_text
    measured = Measured(*groups, chosen, chosen, rejected, features, features, ids)
    kernel = training_kernel(measured)
    behaviours = behaviour_rows(measured, kernel, draws=job.ours.draws, seed=job.training.seed)
    alignment, answers = alignments(measured), AnswerCounts()
    run.write_table("behaviours", behaviours)
    run.write_table("pairs", pair_rows(prepared, {"alignment": alignment}, answers))
    evidence = Evidence(behaviours, finding_columns(prepared, alignment), answers, prepared.counts, kernel)
    run.write_table("findings", [finding._asdict() for finding in find_all(evidence)])
    run.finish_stage(
        "audit",
        key=key,
        seconds=watch.seconds,
        foretune_version=versions()["foretune"],
        provenance=provenance_of(prepared),
        data={**prepared.data.info.as_dict(), "counts": prepared.counts},
        audit={
            "answers": None,
            "kernel": kernel._asdict(),
            "initial_rates": dict(zip(kernel.behaviours, initial_rates(kernel).tolist(), strict=True)),
            "equal_rate_mixture": dict(zip(kernel.behaviours, equal_rate_mixture(kernel).tolist(), strict=True)),
            "notes": prepared.data.info.notes,
        },
    )


def _train(data: RewardData, progress: Progress) -> None:
    """The real run, with TRL."""
    watch, job, run, prepared = Stopwatch(), data.job, data.job.run, data.prepared
    key = training_key(data)
    if run.is_finished("train", key):
        return
    progress.say(f"train: {job.trainable} …")
    done = _run_on_states(data) if job.ours.stored_states else _run(data)
    run.write_table("observed", reward_curves(data, done.steps, done.margins))
    pair_ids = prepared.pairs.pair_id[prepared.observed]
    run.write_arrays("observed_pairs", pair_id=pair_ids, steps=np.array(done.steps), margins=done.margins)
    notes = [ONE_COMPUTATION] if job.ours.stored_states else []
    section = {"trainable": job.trainable, "steps": done.num_steps, "seconds": watch.seconds, "notes": notes}
    run.finish_stage("train", key=key, seconds=watch.seconds, train=section)


def _run(data: RewardData) -> RewardRun:
    """Train and save."""
    seen = [data.sequences[pair] for pair in data.prepared.observed]
    sides = [chosen for chosen, _ in seen] + [rejected for _, rejected in seen]
    observer = ModelObserver(lambda model: rewards(model, sides).view(2, -1), count=data.job.ours.observations)
    trainer = _trainer(data, observer)
    observer.log = lambda found: Trainer.log(trainer, _metrics(data, found))
    trainer.train()
    trainer.save_model(str(data.job.run.path))
    return observer.run(trainer)


def _run_on_states(data: RewardData) -> RewardRun:
    """The same without the decoder."""
    loaded = data.prepared.loaded
    done = head_run(data, loaded.model.score, data.job.training.seed, data.prepared.train_pairs)
    loaded.model.score.load_state_dict(done.head.state_dict())
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(str(data.job.run.path))
    return done


def _trainer(data: RewardData, observer: ModelObserver) -> RewardTrainer:
    """The trainer that `trl reward` would build, on the encoded pairs."""
    job, prepared, model = data.job, data.prepared, data.prepared.loaded.model
    if job.trainable == "score":
        model.requires_grad_(False)
        model.score.requires_grad_(True)
    adapters = None
    if job.trainable == "lora":
        adapters = lora_config(job.model, model)
        assert isinstance(adapters, LoraConfig)
        adapters.task_type = "SEQ_CLS"
        adapters.modules_to_save = sorted({*(adapters.modules_to_save or []), "score"})
    train = prepared.train_pairs
    test = np.flatnonzero(prepared.split_of == "test") if job.training.eval_strategy != "no" else []
    rows = [
        reward_rows([data.sequences[pair] for pair in members], None if data.targets is None else data.targets[members])
        for members in (train, test)
    ]
    trainer = RewardTrainer(
        model=model,
        args=job.training,
        train_dataset=rows[0],
        eval_dataset=rows[1] if len(test) else None,
        processing_class=prepared.loaded.tokenizer,
        peft_config=adapters,
        callbacks=[TrainingBar(), observer],
    )
    quieten(trainer)
    return trainer


def _metrics(data: RewardData, found: NDArray[np.float64]) -> dict[str, float]:
    """What is logged of one observation: accuracy, loss and margin of each behaviour."""
    rows = reward_curves(data, [0], (found[0] - found[1])[None])
    return {
        f"observed_{row['split']}_{name}/{row['behaviour']}": row[name]
        for row in rows
        for name in ("reward_accuracy", "loss", "margin")
        if row["behaviour"] != ALL
    }
