"""`rlhf`: a policy is trained on a reward model, every behaviour's reward and KL measured, forecast beside outcome."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer

from foretune.dynamics.curves import ALL, observation_steps
from foretune.dynamics.relinearise import MOST_PAIRS
from foretune.errors import UserError
from foretune.features.unembedding import open_store
from foretune.models.encoding import encode_prompt
from foretune.models.load import LoadedModel, weights_hash
from foretune.models.reward import FrozenReward, load_reward_model
from foretune.records import RunFolder
from foretune.records.provenance import sha256_of, versions
from foretune.training.build import lora_config
from foretune.training.policy_trainer import build_policy_trainer, planned_rates
from foretune.training.reward_trainer import ModelObserver
from foretune.training.terminal import TrainingBar
from foretune.verbs.audit import write_command
from foretune.verbs.prepare import Stopwatch, discard, load_reference
from foretune.verbs.progress import Progress
from foretune.verbs.rlhf_job import RlhfJob, rlhf_job_from
from foretune.verbs.rlhf_policy import Drawn, Judges, Measure, OneToken, PolicyTask, Prompt

FIGURES = ("reward", "heldout_reward", "kl")


def rlhf(job: RlhfJob | None = None, *, progress: Progress | None = None, **arguments: Any) -> RunFolder:
    """Forecast and run policy optimisation with a reward model.

    Args:
        job: a resolved job, or None to build one from `arguments`.
        progress: where progress is shown; None: nowhere.
        **arguments: those of `trl rloo` and foretune's.

    Returns:
        The run folder, with policy.parquet (forecast and observed reward, held-out reward and KL of each behaviour),
        the trained policy, and in record.json where the held-out reward stopped following (`rlhf`).

    Raises:
        UserError: anything wrong with arguments, data or models.
    """
    job, progress = job or rlhf_job_from(**arguments), progress or Progress.silent()
    run, watch = job.run, Stopwatch()
    if job.ours.restart:
        discard(run)
    loaded = load_reference(job)
    if job.trainable == "lora":
        lora_config(job.model, loaded.model)  # refuse before any work
    judges = _judges(job, loaded)
    prompts, num_train = _prompts(job, loaded)
    key = sha256_of(
        weights_hash(loaded.model),
        [judge.digest for judge in judges.models],
        prompts,
        {k: v for k, v in job.explicit.items() if k != "output_dir"},
    )
    if run.is_finished("rlhf", key):
        progress.say("rlhf: already in the run folder.")
        return run
    observed = _observed(prompts, num_train, job.ours.observe_pairs or MOST_PAIRS)
    write_command(job)
    progress.say("rlhf: measuring the reference …")
    measure = _measure(job, PolicyTask(loaded, prompts, num_train, observed, judges), key)
    observer = ModelObserver(measure, count=job.ours.observations)
    trainer = build_policy_trainer(
        load_reference(job, to_train=True).model.to(job.device()),
        judges.models,
        job.training,
        loaded.tokenizer,
        trainable=job.trainable,
        lora=job.model,
        prompts=[prompt.text for prompt in prompts[:num_train]],
        callbacks=[TrainingBar(), observer],
    )
    seen = [prompts[index] for index in observed]
    observer.log = lambda found: Trainer.log(trainer, _metrics(seen, found))
    progress.say("rlhf: forecast …")
    rates = planned_rates(trainer)
    steps = observation_steps(len(rates), job.ours.observations)
    times = np.concatenate([[0.0], np.cumsum(rates)])[steps]
    paths = measure.forecast(times, job.training.beta)
    rows = [row for path in paths for row in _rows(seen, path.method, steps, path.figures)]
    progress.say(f"rlhf: training {job.trainable} …")
    trainer.train()
    trainer.save_model(str(run.path))
    happened = np.stack([observer.found[step] for step in steps])
    rows += _rows(seen, "observed", steps, happened)
    run.write_table("policy", rows)
    section = {
        "trainable": job.trainable,
        "beta": job.training.beta,
        "steps": steps[-1],
        "forecast_methods": [path.method for path in paths],
        "overoptimised": overoptimised(rows) if len(judges.models) > 1 else {},
        "notes": [*measure.notes, *_notes(job)],
    }
    for note in section["notes"]:
        progress.say(note)
    about = {"foretune_version": versions()["foretune"], "provenance": {"versions": versions()}}
    run.finish_stage("rlhf", key=key, seconds=watch.seconds, rlhf=section, **about)
    return run


def _judges(job: RlhfJob, loaded: LoadedModel) -> Judges:
    """The reward models; of a folder with an ensemble, the mean reward of its members."""
    models = []
    for name in filter(None, (job.ours.reward_model, job.ours.heldout_reward_model)):
        judge = load_reward_model(name, trust_remote_code=job.training.trust_remote_code)
        if judge.has_new_head:
            raise UserError(f"'{name}' is no reward model (it has no score head): train one with `foretune reward`.")
        if judge.loaded.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                f"the reward model '{name}' has another tokenizer than the policy: train one on its decoder."
            )
        model = judge.loaded.model.to(job.device())
        if (members := RunFolder(name).read_arrays("ensemble")) is not None:
            model.score.weight.data.copy_(torch.from_numpy(members["heads"].mean(0, keepdims=True)))
        models.append(FrozenReward(model))
    return Judges(models, loaded.tokenizer.eos_token_id)


def _prompts(job: RlhfJob, loaded: LoadedModel) -> tuple[list[Prompt], int]:
    """Each behaviour's prompts, once each, training prompts first; and how many those are."""
    data, found = job.load_data(), {}
    for split, rows in (("train", data.train), ("test", data.test)):
        for row in rows or ():
            ids = encode_prompt(row["prompt"], loaded.tokenizer)
            found.setdefault((row["behaviour"], tuple(ids)), Prompt(row["prompt"], ids, row["behaviour"], split))
    prompts = list(found.values())
    return prompts, sum(prompt.split == "train" for prompt in prompts)


def _observed(prompts: list[Prompt], num_train: int, count: int) -> NDArray[np.int64]:
    """The first `count` prompts of each behaviour and split; behaviours that are not trained on are left out."""
    trained, seen, chosen = {prompt.behaviour for prompt in prompts[:num_train]}, {}, []
    for index, prompt in enumerate(prompts):
        group = (prompt.behaviour, prompt.split)
        seen[group] = seen.get(group, 0) + 1
        if prompt.behaviour in trained and seen[group] <= count:
            chosen.append(index)
    return np.array(chosen)


def _measure(job: RlhfJob, task: PolicyTask, key: str) -> Measure:
    if job.training.max_completion_length == 1:
        return OneToken(task, candidates=job.ours.candidates)
    return Drawn(
        task,
        max_tokens=job.training.max_completion_length,
        seed=job.training.seed,
        store=open_store(job.run.path, key),
    )


def _rows(
    prompts: list[Prompt], method: str, steps: list[int], figures: NDArray[np.float64]
) -> Iterator[dict[str, Any]]:
    """Rows of policy.parquet: means over the prompts of each behaviour and split."""
    owner = np.array([prompt.behaviour for prompt in prompts])
    split_of = np.array([prompt.split for prompt in prompts])
    for split in np.unique(split_of):
        for behaviour in [*np.unique(owner[split_of == split]), ALL]:
            own = (split_of == split) & ((owner == behaviour) | (behaviour == ALL))
            for step, found in zip(steps, figures, strict=True):
                means = dict(zip(FIGURES, map(float, found[:, own].mean(1)), strict=True))
                group = {"method": method, "behaviour": str(behaviour), "split": str(split), "step": step}
                yield {**group, **means, "num_prompts": int(own.sum())}


def _metrics(prompts: list[Prompt], found: NDArray[np.float64]) -> dict[str, float]:
    return {
        f"observed_{row['split']}_{name}/{row['behaviour']}": row[name]
        for row in _rows(prompts, "observed", [0], found[None])
        for name in FIGURES
        if row["behaviour"] != ALL
    }


def overoptimised(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Behaviours whose reward rose to the end while the held-out reward did not, on held-out prompts where there are.

    Args:
        rows: of policy.parquet.

    Returns:
        For each such behaviour the step at which its held-out reward was highest, and how far both have moved from
        there to the end.
    """
    observed = [row for row in rows if row["method"] == "observed" and row["behaviour"] != ALL]
    split = "test" if any(row["split"] == "test" for row in observed) else "train"
    found = {}
    for behaviour in sorted({row["behaviour"] for row in observed if row["split"] == split}):
        curve = [row for row in observed if (row["behaviour"], row["split"]) == (behaviour, split)]
        peak, end = max(curve, key=lambda row: row["heldout_reward"]), curve[-1]
        if end["heldout_reward"] < peak["heldout_reward"] and end["reward"] > peak["reward"]:
            change = {name: end[name] - peak[name] for name in ("reward", "heldout_reward")}
            found[behaviour] = {"peak_step": peak["step"], **change}
    return found


def _notes(job: RlhfJob) -> list[str]:
    """Where the forecast's assumptions do not hold."""
    arguments, assumed = job.training, []
    if job.trainable != "unembedding":
        assumed.append(f"the run trains {job.trainable}, the forecast is of the output layer alone")
    if (optimizer := str(getattr(arguments.optim, "value", arguments.optim))) != "sgd":
        assumed.append(f"the run steps with {optimizer}, the forecast with SGD at the same learning rates")
    elif arguments.max_grad_norm:
        assumed.append(f"the run clips gradients at {arguments.max_grad_norm:g}, the forecast does not")
    return [f"The forecast's time is Σ learning rates: {'; '.join(assumed)}."] if assumed else []
