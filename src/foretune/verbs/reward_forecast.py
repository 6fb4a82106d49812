"""The forecast of a reward model: its score head trained by TRL on stored hidden states; ensembles of such heads."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from foretune.dynamics.curves import ALL, curve_rows, learning_order
from foretune.dynamics.flow import gradient_flow
from foretune.models.reward import drawn_head
from foretune.objectives import BradleyTerry
from foretune.records.provenance import sha256_of
from foretune.training.reward_trainer import RewardRun, train_on_states
from foretune.verbs.prepare import Stopwatch
from foretune.verbs.progress import Progress
from foretune.verbs.reward_data import RewardData


def forecast_reward(data: RewardData, head: nn.Linear, progress: Progress) -> None:
    """Forecast the score head's training: of the mixture, of each behaviour alone, of an ensemble."""
    watch, job, run, prepared = Stopwatch(), data.job, data.job.run, data.prepared
    key = training_key(data)
    if run.is_finished("forecast", key):
        return
    progress.say("forecast: the score head …")
    joint = head_run(data, head, job.training.seed, prepared.train_pairs)
    rows = _labelled(reward_curves(data, joint.steps, joint.margins), "simulated_run", "mixture")
    order = learning_order(rows, split="train")
    if not job.training.center_rewards_coefficient:
        rows += _flow_rows(data, head, joint)
    if job.ours.forecast_alone:
        rows += _alone(data, head, joint, progress)
    run.write_table("forecast", rows)
    pair_ids = prepared.pairs.pair_id[prepared.observed]
    run.write_arrays("forecast_pairs", pair_id=pair_ids, steps=np.array(joint.steps), margins=joint.margins)
    if job.ours.ensemble:
        _ensemble(data, joint, progress)
    run.finish_stage("forecast", key=key, seconds=watch.seconds, forecast=_section(data, joint, order, watch))


def head_run(data: RewardData, head: nn.Linear, seed: int, train: NDArray[np.int64], **changes: Any) -> RewardRun:
    """Train the score head alone on these pairs."""
    arguments = copy.copy(data.job.training)
    for name, value in {"seed": seed, **changes}.items():
        setattr(arguments, name, value)
    return train_on_states(
        data.states,
        head,
        arguments,
        data.prepared.loaded.tokenizer,
        train_pairs=train,
        targets=None if data.targets is None else data.targets[train],
        observed=data.prepared.observed,
        observations=data.job.ours.observations,
    )


def reward_curves(data: RewardData, steps: list[int], margins: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Rows of observed.parquet: curves over the observed pairs, margins of shape (steps, pairs)."""
    members = data.prepared.observed
    groups = data.prepared.behaviour_of[members], data.prepared.split_of[members]
    return curve_rows(
        steps,
        margins,
        *groups,
        data.objective(members),
        reference_margin=np.zeros(len(members)),
        weights=np.ones(len(members)),
    )


def _labelled(rows: list[dict[str, Any]], method: str, trained_on: str) -> list[dict[str, Any]]:
    return [{"method": method, "trained_on": trained_on, **row} for row in rows]


def _flow_rows(data: RewardData, head: nn.Linear, joint: RewardRun) -> list[dict[str, Any]]:
    """Gradient flow of the score head from where it starts, on the clock Σ learning rates."""
    features, train = data.features(), data.prepared.train_pairs
    start = features @ head.weight[0].detach().double().cpu().numpy()
    targets = np.zeros(len(features)) if data.targets is None else data.targets
    times = np.concatenate([[0.0], np.cumsum(joint.learning_rates)])[joint.steps]
    objective = BradleyTerry(target=(targets - start)[train])
    path = gradient_flow(features[train], np.ones(len(train)), objective, times=times)
    seen = data.prepared.observed
    rows = reward_curves(data, joint.steps, start[seen] + path @ features[seen].T)
    return _labelled(rows, "gradient_flow", "mixture")


def _alone(data: RewardData, head: nn.Linear, joint: RewardRun, progress: Progress) -> list[dict[str, Any]]:
    """Curves of each behaviour trained alone, for as many steps as the joint run has."""
    prepared, arguments, rows = data.prepared, data.job.training, []
    train = prepared.train_pairs
    for behaviour in np.unique(prepared.behaviour_of[train]):
        progress.say(f"forecast: {behaviour} alone …")
        own = train[prepared.behaviour_of[train] == behaviour]
        drop_last = arguments.dataloader_drop_last and len(own) >= arguments.train_batch_size
        changes = {"max_steps": joint.num_steps, "dataloader_drop_last": drop_last}
        run = head_run(data, head, arguments.seed, own, **changes)
        curves = _labelled(reward_curves(data, run.steps, run.margins), "simulated_run", "alone")
        rows += [row for row in curves if row["behaviour"] == behaviour]
    return rows


def _ensemble(data: RewardData, joint: RewardRun, progress: Progress) -> None:
    """Heads trained with other seeds (start and batch order); the first is the run's own."""
    job, heads = data.job, [joint.head]
    for number in range(1, job.ours.ensemble):
        progress.say(f"ensemble: member {number + 1} of {job.ours.ensemble} …")
        seed = job.training.seed + number
        head = drawn_head(data.prepared.loaded.model, seed)
        heads.append(head_run(data, head, seed, data.prepared.train_pairs).head)
    weights = torch.cat([head.weight.detach() for head in heads]).double().cpu().numpy()
    job.run.write_arrays("ensemble", heads=weights)
    job.run.write_table("ensemble", _ensemble_rows(data, weights))


def _ensemble_rows(data: RewardData, heads: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """How the members differ on all pairs of each behaviour."""
    margins, prepared = heads @ data.features().T, data.prepared
    losses = data.objective(np.arange(margins.shape[1])).value(margins)
    for split in np.unique(prepared.split_of):
        in_split = prepared.split_of == split
        for behaviour in [*np.unique(prepared.behaviour_of[in_split]), ALL]:
            members = in_split if behaviour == ALL else in_split & (prepared.behaviour_of == behaviour)
            accuracies, own = (margins[:, members] > 0).mean(1), margins[:, members]
            yield {
                "behaviour": str(behaviour),
                "split": str(split),
                "members": len(heads),
                "reward_accuracy": float(accuracies.mean()),
                "reward_accuracy_spread": float(accuracies.std(ddof=1)),
                "loss": float(losses[:, members].mean()),
                "loss_spread": float(losses[:, members].mean(1).std(ddof=1)),
                "margin": float(own.mean()),
                "margin_spread": float(own.std(0, ddof=1).mean()),
                "agreement": float((np.abs(np.sign(own).sum(0)) == len(heads)).mean()),
                "num_pairs": int(members.sum()),
            }


def _section(data: RewardData, joint: RewardRun, order: list[str], watch: Stopwatch) -> dict[str, Any]:
    job, arguments = data.job, data.job.training
    centring = arguments.center_rewards_coefficient
    rates = job.run.record["audit"]["initial_rates"]
    notes = []
    if job.trainable != "score":
        notes.append(
            f"The run trains {'LoRA adapters' if job.trainable == 'lora' else 'all weights'}, the forecast is of the "
            "score head alone: expect its order of the behaviours to hold better than its sizes."
        )
    if centring:
        notes.append("Losses shown are without the centring term, which the run minimises as well.")
    return {
        "trainable": job.trainable,
        "twin": "score",
        "pilot_steps": 0,
        "what_is_forecast": "the score head, trained alone on the hidden states of the last token",
        "objective": "Bradley–Terry"
        + (", margin column" if data.targets is not None else "")
        + (f", centring {centring:g}" if centring else ""),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "learning_rate": arguments.learning_rate,
        "scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "steps": joint.num_steps,
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps,
        "learning_order": order,
        "unlearned_at_first": sorted(name for name, rate in rates.items() if rate < 0),
        "seconds": watch.seconds,
        "notes": notes,
    }


def training_key(data: RewardData) -> str:
    """Everything that training and its forecast depend on."""
    irrelevant = {"output_dir", "report_to", "run_name", "disable_tqdm", "logging_steps", "draws"}
    settings = {name: value for name, value in data.job.explicit.items() if name not in irrelevant}
    return sha256_of(data.key, settings)
