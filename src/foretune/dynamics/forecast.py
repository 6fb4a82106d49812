"""The forecast of a run: curves per behaviour, jointly and each behaviour alone."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution
from torch import Tensor

from foretune import processes
from foretune.dynamics.by_heart import ByHeart
from foretune.dynamics.closed_form import second_order_weights
from foretune.dynamics.closing_look import Look, closing_look, with_look
from foretune.dynamics.curves import curve_rows, learning_order
from foretune.dynamics.flow import gradient_flow
from foretune.dynamics.margin_model import NO_PAIRS, MarginModel, Renewal
from foretune.dynamics.simulated_run import SimulatedRun, simulate_run
from foretune.objectives import LossOfPairs, RankingLoss, SidedLoss
from foretune.objectives.base import FloatArray
from foretune.statistics.behaviours import representatives
from foretune.statistics.moments import Rows, RowSource, blocks_of

# Figures that have a band.
BANDS = ("loss", "reward_accuracy", "margin")
# The second-order closed form diagonalises a matrix of this size at most.
LARGEST_SPECTRUM = 4096
# The flow needs its features in memory at every moment: at most so many numbers, 128 MB.
LARGEST_FEATURES = 2**24


class Variant(NamedTuple):
    """The same run with what could have been otherwise.

    Attributes:
        margins: perhaps from other parameters, or with other pairs that stand for those not measured.
        renewal: the anchors of the forecast itself.
        data_seed: of another batch order.
    """

    margins: MarginModel
    renewal: Renewal | None
    data_seed: int


class ForecastProblem(NamedTuple):
    """What a forecast is made from; n pairs, those trained on and those held out.

    Attributes:
        margins: the run's margins as a function of what it trains.
        margins_alone: the same, perhaps coarser, for the runs of single behaviours; None: those are not wanted.
        features: φ of each pair under the unembedding alone, shape (n, dim); None: no gradient flow is wanted (there is
            none of rankings and of sided losses).
        reference_margin: log π_ref(chosen) − log π_ref(rejected), shape (n,).
        pair_id: shape (n,); they decide which pairs the flow takes where they are too many.
        behaviour_of: shape (n,).
        split_of: shape (n,).
        weights: row weights, mean 1 over the training pairs, shape (n,).
        train_pairs: indices of the training pairs in the order of the training data.
        observed: indices of the pairs that curves are averaged over.
        objective: the loss.
        arguments: the run's own `TrainingArguments`.
        observations: number of recorded steps.
        reference_free: the loss sees log π(chosen) − log π(rejected) itself; margins are against the reference anyway.
        checkpoint: of the pilot that the simulated run goes on from (see `simulate_run`).
        past: what was observed of the pilot, at `followed(observed)`.
        renewal: where margins are linearised anew (see `simulate_run`).
        variants: asked after the joint run for runs that could be instead, two at least, for its band; or none.
        place: the measured pair that each pair is, or that stands for it, shape (n,); None: all are themselves.
        measured: the measured pairs, shape (m,); None: all are.
        looked: training pairs without features that are scored at anchors, to tell what is learned by heart.
        look: scores `followed(observed)` with the model itself at the joint run's end, whose parameters it is given;
            returns None where that says nothing.
    """

    margins: MarginModel
    margins_alone: MarginModel | None
    features: RowSource | None
    reference_margin: FloatArray
    pair_id: np.ndarray
    behaviour_of: np.ndarray
    split_of: np.ndarray
    weights: FloatArray
    train_pairs: NDArray[np.int64]
    observed: NDArray[np.int64]
    objective: LossOfPairs
    arguments: Any
    observations: int
    reference_free: bool = False
    checkpoint: Path | None = None
    past: SimulatedRun | None = None
    renewal: Renewal | None = None
    variants: Callable[[], Sequence[Variant]] = tuple
    place: NDArray[np.int64] | None = None
    measured: NDArray[np.int64] | None = None
    looked: NDArray[np.int64] = NO_PAIRS
    look: Callable[[Mapping[str, Tensor]], FloatArray | None] = lambda parameters: None

    def by_heart(self, rows: NDArray[np.int64]) -> ByHeart | None:
        """What a run on these rows would learn by heart."""
        if self.place is None:
            return None
        return ByHeart.of(self.place, rows, self.observed, self.behaviour_of, self.split_of == "train", self.looked)

    def offsets(self, pairs: NDArray[np.int64]) -> FloatArray:
        """What the loss adds to the margins of some pairs, shape (len(pairs),)."""
        return self.reference_margin[pairs] if self.reference_free else np.zeros(len(pairs))

    def followed(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """What of `margins` is recorded for some pairs: their margins, and with a sided loss their chosen scores."""
        return self.objective.both(pairs) if isinstance(self.objective, SidedLoss) else pairs


class Forecast(NamedTuple):
    """Curves and what follows from them.

    Attributes:
        rows: rows of forecast.parquet.
        steps: recorded steps of the joint run.
        margins: joint simulated run: margins of the observed pairs at those steps, shape (T, observed).
        chosen: the same of the chosen responses' scores, where the loss is sided.
        order: behaviours in the order in which they are learned, first to last.
        num_steps: optimiser steps of the run.
        learning_rates: at every step.
        missed: what the simulation lacked at the joint run's end, and `margins` hold; of `followed(observed)`.
        look: what a look at the joint run's end has found; None: there was none.
    """

    rows: list[dict[str, Any]]
    steps: list[int]
    margins: FloatArray
    chosen: FloatArray | None
    order: list[str]
    num_steps: int
    learning_rates: list[float]
    missed: FloatArray
    look: Look | None


def forecast_run(problem: ForecastProblem, *, progress: Callable[[str], None] = lambda what: None) -> Forecast:
    """Forecast the run: simulated with the user's optimiser, and for the unembedding by gradient flow as well.

    Args:
        problem: what to forecast.
        progress: told what is being computed.
    """
    progress("the joint run")
    joint = _joint(problem, problem.margins, problem.renewal, problem.arguments)
    look, begun, change = _look(problem, joint), _begun(problem, joint), joint.margins[-1] - joint.margins[0]
    missed = look.missed if look is not None and look.believed else begun
    joint = with_look(joint, missed, change, begun)
    if problem.past is not None:
        joint = joint.after(problem.past)
    rows = _rows(problem, "simulated_run", "mixture", joint.steps, joint.margins)
    if variants := problem.variants():
        _add_bands(rows, [_rows_of_variant(problem, variant, joint, progress) for variant in variants])
    order = learning_order(rows, split="train")
    rows += _flows(problem, "mixture", problem.train_pairs, joint)
    if problem.margins_alone is not None:
        rows += _each_alone(problem, problem.margins_alone, joint, (missed, change), progress)
    sides = _sides(problem, joint.margins)
    return Forecast(rows, joint.steps, *sides, order, joint.num_steps, joint.learning_rates, missed, look)


def _joint(problem: ForecastProblem, margins: MarginModel, renewal: Renewal | None, arguments: Any) -> SimulatedRun:
    with processes.with_whole_parameters():
        return simulate_run(
            margins,
            arguments,
            problem.objective,
            train_pairs=problem.train_pairs,
            weights=problem.weights[problem.train_pairs],
            offsets=problem.offsets(problem.train_pairs),
            observed=problem.followed(problem.observed),
            observations=problem.observations,
            checkpoint=problem.checkpoint,
            renewal=renewal,
            by_heart=problem.by_heart(problem.train_pairs),
        )


def _begun(problem: ForecastProblem, joint: SimulatedRun) -> FloatArray:
    """What others' margins lack where the simulation begins, as far as they were observed at the end of a pilot."""
    past, followed = problem.past, problem.followed(problem.observed)
    if past is None or past.steps[-1] != joint.steps[0]:
        return np.zeros(len(followed))
    measured = problem.followed(problem.observed if problem.measured is None else problem.measured)
    return np.where(np.isin(followed, measured), 0.0, past.margins[-1] - joint.margins[0])


def _look(problem: ForecastProblem, joint: SimulatedRun) -> Look | None:
    looked = problem.look(joint.end)
    if looked is None or problem.measured is None:
        return None
    measured, behaviour_of = np.isin(problem.observed, problem.measured), problem.behaviour_of[problem.observed]
    stands_for = np.where(problem.split_of[problem.observed] == "train", 1.0, np.inf)
    for name in np.unique(problem.behaviour_of[problem.train_pairs]):
        rows = problem.train_pairs[problem.behaviour_of[problem.train_pairs] == name]
        stands_for[behaviour_of == name] *= len(rows) / len(np.intersect1d(rows, problem.measured))
    return closing_look(joint.end_margins, joint.margins[-1], looked, measured, behaviour_of, stands_for)


def _rows_of_variant(
    problem: ForecastProblem, variant: Variant, joint: SimulatedRun, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    progress("the same run from another seed")
    arguments = copy.copy(problem.arguments)
    arguments.data_seed = variant.data_seed
    if arguments.train_sampling_strategy == "sequential":  # then the rows' own order decides the batches
        order = np.random.default_rng(variant.data_seed).permutation(problem.train_pairs)
        problem = problem._replace(train_pairs=order)
    run = _joint(problem, variant.margins, variant.renewal, arguments)
    return _rows(problem, "simulated_run", "mixture", joint.steps, run.after(joint).margins)


def _add_bands(rows: list[dict[str, Any]], variants: Sequence[list[dict[str, Any]]]) -> None:
    """Add 90 % prediction intervals around `rows`: Student's t with the variants' standard deviation."""
    count = len(variants)
    width = float(t_distribution.ppf(0.95, count - 1)) * np.sqrt(1 + 1 / count)
    for row, others in zip(rows, zip(*variants, strict=True), strict=True):
        for name in BANDS:
            reach = width * float(np.std([other[name] for other in others], ddof=1))
            least, most = (0.0, 1.0) if name == "reward_accuracy" else (-np.inf, np.inf)
            row |= {f"{name}_low": max(row[name] - reach, least), f"{name}_high": min(row[name] + reach, most)}


def _each_alone(
    problem: ForecastProblem,
    margins: MarginModel,
    joint: SimulatedRun,
    seen: tuple[FloatArray, FloatArray],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Curves of every behaviour trained alone; several processes divide the behaviours."""
    behaviours = np.unique(problem.behaviour_of[problem.train_pairs])

    def share() -> list[tuple[int, list[dict[str, Any]]]]:
        found = []
        for number in processes.mine(range(len(behaviours))):
            progress(f"{behaviours[number]} alone")
            found.append((number, _alone(problem, margins, behaviours[number], joint, seen)))
        return found

    numbered = [part for parts in processes.together(share) for part in parts]
    return [row for _, rows in sorted(numbered, key=lambda part: part[0]) for row in rows]


def _alone(
    problem: ForecastProblem,
    margins: MarginModel,
    behaviour: str,
    joint: SimulatedRun,
    seen: tuple[FloatArray, FloatArray],
) -> list[dict[str, Any]]:
    """Curves of one behaviour trained alone, for as many steps as the joint run has, with what was missed there."""
    own = problem.train_pairs[problem.behaviour_of[problem.train_pairs] == behaviour]
    weights = problem.weights[own]
    if weights.sum() == 0:
        return []
    arguments = copy.copy(problem.arguments)
    arguments.max_steps = joint.num_steps
    arguments.gradient_accumulation_steps *= processes.count()  # each process repeats the whole run of some behaviours
    arguments.dataloader_drop_last &= len(own) >= arguments.train_batch_size  # a step needs a batch
    members = problem.observed[problem.behaviour_of[problem.observed] == behaviour]
    with processes.as_one_process():
        run = simulate_run(
            margins,
            arguments,
            problem.objective,
            train_pairs=own,
            weights=weights / weights.mean(),
            offsets=problem.offsets(own),
            observed=problem.followed(members),
            observations=problem.observations,
            by_heart=problem.by_heart(own),
        )
    mine = np.isin(problem.followed(problem.observed), problem.followed(members))
    run = with_look(run, *(part[mine] for part in seen), begun=0.0)
    rows = _rows(problem, "simulated_run", "alone", run.steps, run.margins, members)
    return rows + _flows(problem, "alone", own, joint, members)


def _flows(
    problem: ForecastProblem,
    trained_on: str,
    train: NDArray[np.int64],
    joint: SimulatedRun,
    members: NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    """Gradient flow and second order on the clock Σ learning rates (the clock of SGD), at the joint run's steps."""
    if problem.features is None or isinstance(problem.objective, RankingLoss | SidedLoss):
        return []
    rows_in_flow = flow_rows(problem.features, problem, train)
    times = np.concatenate([[0.0], np.cumsum(joint.learning_rates)])[joint.steps]
    features, weights = np.asarray(problem.features[rows_in_flow.pairs], dtype=float), rows_in_flow.weights
    paths = {"gradient_flow": gradient_flow(features, weights, problem.objective, times=times)}
    uniform = np.ptp(problem.weights[train]) == 0
    convex = float(problem.objective.curvature(np.array(0.0))) >= 0  # else the expansion grows without bound
    if uniform and convex and min(features.shape) <= LARGEST_SPECTRUM:
        paths["second_order"] = second_order_weights(times, features, problem.objective)
    seen = Rows(problem.features, problem.observed if members is None else members)
    rows = []
    for method, path in paths.items():
        margins = np.concatenate([path @ block.T for block in blocks_of(seen)], axis=1)
        rows += _rows(problem, method, trained_on, joint.steps, margins, members)
    return rows


class FlowRows(NamedTuple):
    """The training pairs that the flow is computed from.

    Attributes:
        pairs: their indices, shape (m,).
        weights: row weights, with those of the pairs that they stand for, shape (m,).
    """

    pairs: NDArray[np.int64]
    weights: FloatArray


def flow_rows(features: RowSource, problem: ForecastProblem, train: NDArray[np.int64]) -> FlowRows:
    """All of `train`; or where their features are more than LARGEST_FEATURES, a share of each behaviour's.

    The share is drawn by pair id and stands for the rest: its weights keep the behaviour's total.
    """
    limit = max(LARGEST_FEATURES // features.shape[1], 1)
    if len(train) <= limit:
        return FlowRows(train, problem.weights[train])
    owner = np.unique(problem.behaviour_of[train], return_inverse=True)[1]
    chosen = representatives(problem.pair_id[train], owner, limit)
    weights = problem.weights[train]
    totals, kept = np.bincount(owner, weights), np.bincount(owner[chosen], weights[chosen])
    return FlowRows(train[chosen], weights[chosen] * (totals / np.where(kept > 0, kept, 1.0))[owner[chosen]])


def _rows(
    problem: ForecastProblem,
    method: str,
    trained_on: str,
    steps: Sequence[int],
    margins: FloatArray,
    members: NDArray[np.int64] | None = None,
) -> list[dict[str, Any]]:
    members = problem.observed if members is None else members
    objective = problem.objective
    margins, chosen = _sides(problem, margins)
    also = {} if chosen is None else {"chosen_displacement": chosen, "rejected_displacement": chosen - margins}
    rows = curve_rows(
        steps,
        margins,
        problem.behaviour_of[members],
        problem.split_of[members],
        objective.within(members) if isinstance(objective, RankingLoss) else objective,
        reference_margin=problem.reference_margin[members],
        weights=problem.weights[members],
        reference_free=problem.reference_free,
        also=also,
    )
    kept = rows if trained_on == "mixture" else [row for row in rows if row["behaviour"] != "all"]
    return [{"method": method, "trained_on": trained_on, **row} for row in kept]


def _sides(problem: ForecastProblem, followed: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """Margins and chosen scores, each of shape (T, k), of what was recorded of k pairs."""
    if not isinstance(problem.objective, SidedLoss):
        return followed, None
    margins, chosen = np.split(followed, 2, axis=1)
    return margins, chosen
