"""The real run: TRL's trainer, observed, whole or in parts."""

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerState
from trl import get_quantization_config

from foretune import processes
from foretune.dynamics.simulated_run import SimulatedRun
from foretune.errors import UserError
from foretune.objectives import SidedObjective
from foretune.records import RunFolder
from foretune.records.linking import link
from foretune.records.provenance import sha256_of
from foretune.training.build import lora_config, prepare_trainable
from foretune.training.method_trainers import build_method_trainer
from foretune.training.observer import BehaviourObserver
from foretune.training.ranking_trainer import RankingTrainer
from foretune.training.terminal import TrainingBar, quieten
from foretune.training.trainer import PreferenceTrainer, log_observation
from foretune.verbs.audit import features_key, write_command
from foretune.verbs.job import Job
from foretune.verbs.losses import ranking_objective_of
from foretune.verbs.prepare import Prepared, load_reference
from foretune.verbs.progress import Progress


def run_trainer(prepared: Prepared, progress: Progress, fraction: float = 1.0) -> tuple[Trainer, BehaviourObserver]:
    """Run the trainer for a fraction of its steps, from the run folder's last checkpoint if there is one.

    Raises:
        UserError: the folder has checkpoints of another run, or of later steps.
    """
    job, run = prepared.job, prepared.job.run
    checkpoint = processes.on_main(lambda: _checkpoint(prepared, fraction))
    write_command(job)
    observer = BehaviourObserver(
        [prepared.pairs[index] for index in prepared.observed],
        count=job.ours.observations,
        folder=run.path / "observations",
        beta=job.training.beta,
        packed=packed(prepared),
    )
    trainer = build_trainer(prepared)
    observer.log = lambda metrics: log_observation(trainer, metrics)
    trainer.add_callback(observer)
    if fraction < 1:
        trainer.add_callback(_StopAt(fraction, observer))
    quieten(trainer)
    if fraction < 1 and checkpoint and (state := Path(checkpoint) / STATE).exists():
        begun = TrainerState.load_from_json(str(state))
        if _is_at_end(run, begun.global_step, _stop(fraction, begun.max_steps)):
            trainer.state = begun  # killed before the pilot was kept
            observer.restore(begun.global_step)
            return trainer, observer
    progress.say(f"train: {job.trainable}, {'continuing from ' + checkpoint if checkpoint else 'from the start'} …")
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, observer


def build_trainer(prepared: Prepared) -> Trainer:
    """The trainer that `trl dpo` would build from the same arguments, with behaviours and weights; or a method's own.

    Raises:
        UserError: row weights for a trainer that has none.
    """
    job = prepared.job
    if job.ours.method != "dpo" and np.ptp(prepared.weights[prepared.train_pairs]) > 0:
        raise UserError(
            f"method {job.ours.method} has no row weights: drop the column '{job.ours.weight_column}' or name another "
            "with --weight_column."
        )
    model = load_reference(job, to_train=True).model
    prepare_trainable(model, job.trainable)
    shared: dict[str, Any] = {
        "peft_config": lora_config(job.model, model) if job.trainable == "lora" else None,
        "callbacks": [TrainingBar()],
    }
    evaluates, tokenizer = job.training.eval_strategy != "no", prepared.loaded.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if job.ours.method != "dpo":
            splits = ("train", "test") if evaluates else ("train",)
            pairs = {split: [pair for pair in prepared.pairs if pair.split == split] for split in splits}
            return build_method_trainer(job.ours.method, model, job.training, tokenizer, **pairs, **shared)
        ranking = None if job.ranking_loss is None else ranking_objective_of(job.ranking_loss, job.training)
        make = PreferenceTrainer if ranking is None else partial(RankingTrainer, objective=ranking)
        return make(
            model=model,
            args=job.training,
            train_dataset=prepared.rows("train"),
            eval_dataset=prepared.rows("test") if evaluates else None,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(job.model),
            exact_head=job.trainable == "unembedding",
            share_prompts=job.ours.share_prompts and packed(prepared),
            **shared,
        )


def packed(prepared: Prepared) -> bool:
    """Whether the audit found that prompts can be computed once."""
    return bool(prepared.job.run.record["audit"]["probes"]["packed"])


def training_settings(job: Job) -> dict[str, Any]:
    """What the user said that the training run depends on."""
    return {name: value for name, value in job.explicit.items() if name not in IRRELEVANT}


def training_key(prepared: Prepared) -> str:
    """Everything that the training run, and what is observed of it, depends on."""
    observed = prepared.pairs.pair_id[prepared.observed].tolist()
    # whatever is audited, all rows are trained on
    features = features_key(prepared._replace(sample=None))
    settings = training_settings(prepared.job)
    return sha256_of(features, prepared.job.trainable, settings, observed, processes.count())


# Arguments of forecasts before training alone.
OF_FORECASTS = {
    *("twin", "twin_pairs", "factor_rank", "twin_coordinates", "relinearise_every", "relinearise_tolerance"),
    *("pilot_fraction", "band_runs", "forecast_alone", "forecast_displacement", "alone_mass"),
}
# Arguments that change no number of a training run.
IRRELEVANT = OF_FORECASTS | {
    *("output_dir", "report_to", "run_name", "disable_tqdm", "logging_steps", "resume_from_checkpoint"),
    *("draws", "sketch_dim", "audit_pairs", "forecast_at"),
}


# Written last into a checkpoint.
STATE = "trainer_state.json"


def _checkpoint(prepared: Prepared, fraction: float) -> str | None:
    """The newest complete checkpoint to continue from; those of another run, or past the fraction, are refused."""
    run, key = prepared.job.run, training_key(prepared)
    named = prepared.job.training.resume_from_checkpoint
    if isinstance(named, str) and named.lower() not in ("true", "false"):
        return named
    states = [TrainerState.load_from_json(str(path)) for path in run.path.glob(f"checkpoint-*/{STATE}")]
    if states and (run.read_json("training.json") or {}).get("key") != key:
        raise UserError(
            f"{run.path} holds checkpoints of a run with other settings, observed pairs or processes: choose another "
            "--output_dir, or pass --restart True to train anew."
        )
    newest = max((own.global_step for own in states), default=0)
    if states:
        _is_at_end(run, newest, _stop(fraction, states[0].max_steps))
    run.write_json("training.json", {"key": key})
    # from that of the last step within an epoch, the trainer would take one more
    usable = [own.global_step for own in states if own.global_step < own.max_steps or (own.epoch or 0) % 1 == 0]
    return str(run.path / f"checkpoint-{max(usable)}") if usable else None


class ObservedMargins(NamedTuple):
    """Margins of the observed pairs, by the convention of the run's loss.

    Attributes:
        reference: chosen less rejected score at step 0, shape (pairs,).
        margins: against step 0, shape (steps, pairs).
        chosen: summed log-probabilities of the chosen responses, against step 0, shape (steps, pairs).
    """

    reference: np.ndarray
    margins: np.ndarray
    chosen: np.ndarray


def observed_margins(prepared: Prepared, observer: BehaviourObserver, steps: list[int]) -> ObservedMargins:
    """The margins at some steps, the first of which is 0."""
    log_probs = np.stack([observer.observations[step] for step in steps])
    found = prepared.job.convention.margins(log_probs, prepared.lengths[prepared.observed])
    return ObservedMargins(found[0], found - found[0], log_probs[:, 0] - log_probs[0, 0])


class Pilot(NamedTuple):
    """The beginning of a run, really trained.

    Attributes:
        step: where it stopped.
        checkpoint: what the trainer saved there.
        past: margins of the observed pairs on the way; of a sided loss, then their chosen scores.
    """

    step: int
    checkpoint: Path
    past: SimulatedRun


def pilot(prepared: Prepared, progress: Progress, *, fraction: float, folder: str) -> Pilot:
    """Train the first `fraction` of the steps; `train` goes on from there.

    Args:
        prepared: the job, audited.
        progress: where bars are shown.
        fraction: of the steps.
        folder: where in the run folder the pilot is kept.

    Raises:
        UserError: the run folder's training is past that step already.
    """
    run, key = prepared.job.run, training_key(prepared)
    kept = run.read_json(f"{folder}/pilot.json") or {}
    arrays = run.read_arrays(f"{folder}/observed")
    if arrays is None or (kept.get("key"), kept.get("fraction")) != (key, fraction):
        trainer, observer = run_trainer(prepared, progress, fraction)
        kept = {"key": key, "fraction": fraction, "step": trainer.state.global_step}
        processes.on_main(lambda: _keep_pilot(prepared, folder, kept, observer))
        trainer.end()
        arrays = run.need_arrays(f"{folder}/observed")
    sided = isinstance(prepared.objective, SidedObjective)
    followed = np.concatenate([arrays["margins"], arrays["chosen"]], 1) if sided else arrays["margins"]
    past = SimulatedRun(arrays["steps"].tolist(), followed, [], kept["step"])
    return Pilot(kept["step"], run.path / folder / "checkpoint", past)


def _keep_pilot(prepared: Prepared, folder: str, kept: dict[str, Any], observer: BehaviourObserver) -> None:
    run = prepared.job.run
    shutil.rmtree(run.path / folder, ignore_errors=True)
    # links: the trainer removes its older checkpoints, this one is needed as long as there is a forecast
    shutil.copytree(run.path / f"checkpoint-{kept['step']}", run.path / folder / "checkpoint", copy_function=link)
    steps = sorted(observer.observations)
    found = observed_margins(prepared, observer, steps)
    run.write_arrays(f"{folder}/observed", steps=np.array(steps), margins=found.margins, chosen=found.chosen)
    run.write_json(f"{folder}/pilot.json", kept)


def _stop(fraction: float, max_steps: int) -> int:
    """The last step of a fraction of a run."""
    return max(1, round(fraction * max_steps))


def _is_at_end(run: RunFolder, step: int, stop: int) -> bool:
    """Whether training is at a pilot's end; past it, it is refused."""
    if step > stop:
        raise UserError(
            f"{run.path} holds training up to step {step}, past the pilot's end at step {stop}: choose another "
            "--output_dir, or pass --restart True to train anew."
        )
    return step == stop


class _StopAt(TrainerCallback):
    """Observe, save and stop after a fraction of the steps."""

    def __init__(self, fraction: float, observer: BehaviourObserver) -> None:
        self._fraction, self._observer = fraction, observer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._observer.steps.add(_stop(self._fraction, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= _stop(self._fraction, state.max_steps):
            control.should_save = control.should_training_stop = True
