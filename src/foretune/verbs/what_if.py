"""`what_if`: the forecast of a changed run, from the features that a forecast left in its run folder.

Neither model nor data are read again, so an answer takes seconds. Features are those of the run that was forecast: an
answer is the better the less the change moves the run away from it.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainingArguments

from foretune import processes
from foretune.data.checks import LARGEST_WEIGHT
from foretune.data.formats import UNPAIRED
from foretune.data.splits import stable_hash
from foretune.dynamics.anchors import Anchors
from foretune.dynamics.arguments import in_order
from foretune.dynamics.by_heart import ByHeart
from foretune.dynamics.closing_look import with_look
from foretune.dynamics.curves import curve_rows
from foretune.dynamics.margin_model import Anchored
from foretune.dynamics.simulated_run import SimulatedRun, simulate_run
from foretune.errors import UserError
from foretune.objectives import LossOfPairs, Objective, SidedLoss, unpaired_order
from foretune.records import RunFolder, load_run
from foretune.records.run_folder import refuse_trained_instead
from foretune.scores import Convention
from foretune.verbs.job import TYPES, Job, job_from
from foretune.verbs.losses import OF_RESPONSES, convention_of, margin_loss, objective_of
from foretune.verbs.values import refuse_unknown

COLUMNS = [
    *("pair_id", "behaviour", "split", "chosen", "chosen_tokens", "rejected_tokens", "weight"),
    *("reference_chosen_logp", "reference_rejected_logp"),
]
# Arguments that change what features were taken of: another forecast is needed for them.
NEEDS_FEATURES = {"output_dir", "seed", "max_length", "truncation_mode", "bf16", "fp16", "loss_type", "method"}


class Answer(NamedTuple):
    """What a changed run would do.

    Attributes:
        rows: for each behaviour (and "all") and split: loss, reward_accuracy and margin at the end, of the forecast run
            (`base_…`), of the changed run, and the `…_change`. Losses are the forecast run's objective in both.
        steps: recorded steps of the changed run.
        margins: of the observed pairs at those steps, shape (T, observed).
        pair_id: of the observed pairs.
    """

    rows: list[dict[str, Any]]
    steps: list[int]
    margins: np.ndarray
    pair_id: np.ndarray


class StoredTwin:
    """A forecast's features and settings, in memory for many questions.

    Args:
        run: the run folder of a finished forecast.

    Raises:
        UserError: no forecast, or one of rankings or of the output layer alone, which leaves no such features.
    """

    def __init__(self, run: RunFolder | Path | str) -> None:
        """Read everything that does not depend on the question."""
        self.folder = run if isinstance(run, RunFolder) else load_run(run)
        if self.folder.stage_key("forecast") is None:
            raise UserError(
                f"{self.folder.path} has no finished forecast: run `foretune forecast --output_dir {self.folder.path}` "
                "first."
            )
        section = self.folder.record["forecast"]
        keys, settings = section["anchors"], section.get("settings") or self.folder.read_yaml("config.yaml")
        refuse_trained_instead(self.folder.path, self.folder.record)
        if not keys or settings is None:
            raise UserError(
                f"the forecast in {self.folder.path} simulated the output layer or a trainer built in Python: "
                "what-ifs need `foretune forecast` of a run of adapters or all weights."
            )
        table, arrays = self.folder.need_table("pairs", COLUMNS), self.folder.need_arrays("forecast_pairs")
        self.settings = {**settings, "output_dir": str(self.folder.path)}
        self.job = job_from(**self.settings)
        self.processes = section.get("processes", 1)
        if self.job.ranking_loss is not None:
            raise UserError(f"the forecast in {self.folder.path} is of rankings: what-ifs are computed for pairs.")
        self.pairs = {name: table[name].to_numpy() for name in COLUMNS}
        device = self.job.device()
        self.anchors = Anchors(self.folder.path, {int(step): key for step, key in keys.items()}, device)
        self.sided = "chosen" in arrays
        self.unpaired = self.folder.record["data"]["format"] == UNPAIRED
        followed = np.concatenate([arrays["margins"], arrays["chosen"]], 1) if self.sided else arrays["margins"]
        self.base = SimulatedRun(arrays["steps"].tolist(), followed, [], 0)
        self._missed = arrays.get("missed")
        place = {pair_id: index for index, pair_id in enumerate(self.pairs["pair_id"])}
        self.observed = np.array([place[pair_id] for pair_id in arrays["pair_id"]])
        self.lengths = np.stack([self.pairs["chosen_tokens"], self.pairs["rejected_tokens"]], 1)

    @property
    def followed(self) -> np.ndarray:
        """What is recorded of the observed pairs: their margins and, of a sided loss, their chosen scores."""
        chosen = self.observed + len(self.pairs["pair_id"])
        return np.concatenate([self.observed, chosen]) if self.sided else self.observed

    def with_look(self, changed: SimulatedRun) -> SimulatedRun:
        """A changed run with what the look at the end of the forecast one has found."""
        if self._missed is None:
            return changed
        begun, end = self.base.margins[self.base.steps.index(self.anchors.first)], self.base.margins[-1] - self._missed
        return with_look(changed, self._missed, end - changed.margins[0], begun - changed.margins[0])

    def by_heart(self, start: Anchored, rows: np.ndarray) -> ByHeart | None:
        """What a run on these rows would learn by heart."""
        behaviour_of = self.pairs["behaviour"]
        place, is_train = start.place[: len(behaviour_of)], self.pairs["split"] == "train"
        return ByHeart.of(place, rows, self.observed, behaviour_of, is_train, start.looked.pairs)

    def loss(self, name: str, job: Job) -> LossOfPairs:
        """A loss of all pairs, with a job's arguments.

        Raises:
            UserError: a loss that cannot be forecast, or a sided one where features were taken of margins alone.
        """
        objective = job.objective() if name == job.losses[0] else objective_of(name, job.training)
        if self.unpaired:
            if name not in OF_RESPONSES:
                raise UserError(f"the data are unpaired rows, of which {name} is no loss: ask about another run.")
            return margin_loss(objective)
        if isinstance(objective, Objective):
            return objective
        if not self.sided:
            raise UserError(
                "this loss treats chosen and rejected scores apart, the forecast followed their difference alone: make "
                "another forecast with this loss."
            )
        return SidedLoss(objective, len(self.pairs["pair_id"]), name in OF_RESPONSES)

    def reference_margins(self, convention: Convention) -> np.ndarray:
        """Chosen less rejected score of each pair under the reference, shape (n,)."""
        log_probs = np.stack([self.pairs["reference_chosen_logp"], self.pairs["reference_rejected_logp"]])
        return convention.margins(log_probs, self.lengths)


def what_if(
    run: "StoredTwin | RunFolder | Path | str",
    *,
    drop: Collection[str] = (),
    weight: Mapping[str, float] | None = None,
    rows_per_behaviour: int | None = None,
    label_noise: float = 0.0,
    objective: str | None = None,
    observations: int = 2,
    **arguments: Any,
) -> Answer:
    """Forecast a run that differs from the one that was forecast.

    Args:
        run: the run folder of a forecast of adapters or all weights, or a `StoredTwin` of it, which answers faster.
        drop: behaviours to train without.
        weight: row weights of behaviours, multiplied with those that rows have.
        rows_per_behaviour: train on at most so many rows of each behaviour, those with the lowest hashes.
        label_noise: share of the training rows whose chosen and rejected responses are exchanged.
        objective: one of FORECAST; one of both scores where the forecast's own loss is such a one; a loss of per-token
            means on a forecast of sums, or the other way round, where chosen and rejected are equally long.
        observations: how many times margins are recorded, evenly spread, first and last step included.
        **arguments: arguments of training that change, e.g. `beta=0.3`, `learning_rate=1e-4`, `num_train_epochs=2`;
            `data_seed` for another order of the batches.

    Returns:
        What happens to every behaviour, beside the forecast as it was.

    Raises:
        UserError: a behaviour that the data do not have; an argument that features depend on; no row is left.
    """
    if observations < 2:
        raise UserError(f"observations is {observations}: it must be at least 2.")
    twin = run if isinstance(run, StoredTwin) else StoredTwin(run)
    job = _changed_job(twin, arguments)
    rows, weights, flipped = changed_rows(
        twin, drop=drop, weight=weight, rows_per_behaviour=rows_per_behaviour, label_noise=label_noise
    )
    name = objective or job.losses[0]
    loss, training = twin.loss(name, job), job.training
    if twin.unpaired:
        order, training = unpaired_order(len(rows), training), in_order(training)
        rows, weights, flipped = rows[order], weights[order], flipped[order]
    factors, offsets = _seen(twin, convention_of(name), rows)
    turned = np.where(flipped, -1.0, 1.0)
    training.gradient_accumulation_steps *= twin.processes  # the run's, simulated here by one
    first = twin.anchors.first
    start = twin.anchors.get(first)
    assert start is not None
    with processes.as_one_process():
        simulated = simulate_run(
            start,
            training,
            loss,
            train_pairs=rows,
            weights=weights,
            observed=twin.followed,
            observations=observations,
            factors=turned * factors,
            offsets=turned * offsets,
            checkpoint=twin.folder.path / "pilot" / "checkpoint" if first else None,
            renewal=lambda step, _: twin.anchors.get(step),
            by_heart=twin.by_heart(start, rows),
        )
    simulated = twin.with_look(simulated)
    if first:
        if simulated.num_steps <= first:
            raise UserError(
                f"the changed run has {simulated.num_steps} steps, and the forecast begins after a pilot of {first}: "
                "make a forecast without --pilot_fraction."
            )
        simulated = simulated.after(twin.base)
    pair_id = twin.pairs["pair_id"][twin.observed]
    return Answer(_compared(twin, simulated), simulated.steps, simulated.margins[:, : len(pair_id)], pair_id)


class ChangedRows(NamedTuple):
    """What a changed run trains on; each of shape (rows,).

    Attributes:
        rows: indices of the training pairs that are left, in their order.
        weights: their weights, mean 1.
        flipped: whether chosen and rejected are exchanged.
    """

    rows: np.ndarray
    weights: np.ndarray
    flipped: np.ndarray


def changed_rows(
    twin: StoredTwin,
    *,
    drop: Collection[str] = (),
    weight: Mapping[str, float] | None = None,
    rows_per_behaviour: int | None = None,
    label_noise: float = 0.0,
) -> ChangedRows:
    """The rows that `what_if` asks about; arguments and errors as there."""
    rows = _rows(twin, drop, rows_per_behaviour)
    return ChangedRows(rows, _weights(twin, rows, weight or {}), _flipped(twin, rows, label_noise))


def _changed_job(twin: StoredTwin, arguments: dict[str, Any]) -> Job:
    of_losses = {"beta", "label_smoothing", "discopop_tau"}
    refuse_unknown(arguments, TYPES)
    known = {item.name for item in fields(TrainingArguments)} | of_losses
    if refused := sorted(set(arguments) & NEEDS_FEATURES | set(arguments) - known):
        raise UserError(f"a what-if cannot change {refused[0]}: make another forecast with it.")
    if twin.anchors.first and (fixed := sorted(set(arguments) - of_losses - {"data_seed"})):
        raise UserError(
            f"a what-if cannot change {fixed[0]} of a forecast that begins with a pilot, which was trained with it: "
            "make a forecast without --pilot_fraction."
        )
    return job_from(**{**twin.settings, **arguments})


def _rows(twin: StoredTwin, drop: Collection[str], limit: int | None) -> np.ndarray:
    """Indices of the training pairs that are left, in their order."""
    train = np.flatnonzero(twin.pairs["split"] == "train")
    behaviour = twin.pairs["behaviour"][train]
    _check_names(twin, drop)
    keep = ~np.isin(behaviour, list(drop))
    if limit is not None:
        if limit < 1:
            raise UserError(f"rows_per_behaviour is {limit}: it must be at least 1.")
        seed = twin.job.training.seed
        lot = np.array([stable_hash(seed, int(pair_id)) for pair_id in twin.pairs["pair_id"][train]])
        for name in np.unique(behaviour):
            keep[_surplus(np.flatnonzero(behaviour == name), lot, twin.pairs["chosen"][train], limit)] = False
    if not keep.any():
        raise UserError("no training row is left: drop fewer behaviours.")
    return train[keep]


def _surplus(members: np.ndarray, lot: np.ndarray, answer: np.ndarray, limit: int) -> np.ndarray:
    """Those of `members` beyond the first `limit`: in turns of the two preferred answers where there are two."""
    ranked = members[np.argsort(lot[members], kind="stable")]
    answers, number = np.unique(answer[ranked], return_inverse=True)
    if len(answers) == 2:
        turn = np.empty(len(ranked), dtype=int)
        for side in (0, 1):
            turn[number == side] = np.arange((number == side).sum())
        ranked = ranked[np.argsort(turn, kind="stable")]
    return ranked[limit:]


def _weights(twin: StoredTwin, rows: np.ndarray, weight: Mapping[str, float]) -> np.ndarray:
    _check_names(twin, weight)
    factor = np.array([weight.get(name, 1.0) for name in twin.pairs["behaviour"][rows]])
    found = twin.pairs["weight"][rows] * factor
    if strange := [name for name, value in weight.items() if not value <= LARGEST_WEIGHT]:
        raise UserError(f"the weight of '{strange[0]}' is {weight[strange[0]]}: it must be a number up to 1e30.")
    if (factor < 0).any() or not found.mean() > 0:
        raise UserError("weights must be 0 or more, and at least one training row needs a weight above 0.")
    return found / found.mean()


class Seen(NamedTuple):
    """What a loss sees of the twin's margins: factor · margin + offset; each of shape (rows,)."""

    factors: np.ndarray
    offsets: np.ndarray


def _seen(twin: StoredTwin, asked: Convention, rows: np.ndarray) -> Seen:
    """What a loss of these scores sees of margins that were forecast by the twin's own convention.

    Raises:
        UserError: means over tokens do not follow from sums, nor sums from means.
    """
    factors = np.ones(len(rows))
    if asked.per_token != twin.job.convention.per_token:
        lengths = twin.lengths[rows]
        if (lengths[:, 0] != lengths[:, 1]).any():
            raise UserError(
                f"this loss takes {asked}, the forecast was of {twin.job.convention}: one follows from the other only "
                "where chosen and rejected are equally long; make another forecast with this loss."
            )
        factors = 1.0 / lengths[:, 0] if asked.per_token else lengths[:, 0].astype(float)
    offsets = np.zeros(len(rows)) if asked.reference else twin.reference_margins(asked)[rows]
    if not np.isfinite(offsets).all():
        raise UserError(
            f"this loss takes {asked}: it needs the scores of every row, of which --audit_pairs left some out; make a "
            "forecast without it."
        )
    return Seen(factors, offsets)


def _flipped(twin: StoredTwin, rows: np.ndarray, share: float) -> np.ndarray:
    """Which rows have their labels flipped: those with the lowest hashes of each behaviour."""
    if not 0 <= share <= 1:
        raise UserError(f"label_noise is {share}: it is a share, from 0 to 1.")
    seed = twin.job.training.seed + 1  # not the order in which rows_per_behaviour leaves rows out
    lot = np.array([stable_hash(seed, int(pair_id)) for pair_id in twin.pairs["pair_id"][rows]])
    found = np.zeros(len(rows), dtype=bool)
    for name in np.unique(twin.pairs["behaviour"][rows]):
        members = np.flatnonzero(twin.pairs["behaviour"][rows] == name)
        found[members[np.argsort(lot[members])[: round(share * len(members))]]] = True
    return found


def _check_names(twin: StoredTwin, names: Collection[str]) -> None:
    known = sorted(set(twin.pairs["behaviour"]))
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"no behaviour is called '{unknown[0]}': there are {', '.join(known)}.")


def _compared(twin: StoredTwin, changed: SimulatedRun) -> list[dict[str, Any]]:
    figures = ("loss", "reward_accuracy", "margin")
    ends = [_end(twin, run) for run in (twin.base, changed)]
    rows = []
    for before, after in zip(*ends, strict=True):
        row = {"behaviour": after["behaviour"], "split": after["split"], "num_pairs": after["num_pairs"]}
        for name in figures:
            row |= {f"base_{name}": before[name], name: after[name], f"{name}_change": after[name] - before[name]}
        rows.append(row)
    return rows


def _end(twin: StoredTwin, run: SimulatedRun) -> list[dict[str, Any]]:
    columns = {name: values[twin.observed] for name, values in twin.pairs.items()}
    end, count = run.margins[-1:], len(twin.observed)
    return curve_rows(
        run.steps[-1:],
        end[:, :count],
        columns["behaviour"],
        columns["split"],
        twin.loss(twin.job.losses[0], twin.job),
        reference_margin=twin.reference_margins(twin.job.convention)[twin.observed],
        reference_free=not twin.job.convention.reference,
        weights=columns["weight"],
        also={"chosen_displacement": end[:, count:]} if twin.sided else None,
    )
