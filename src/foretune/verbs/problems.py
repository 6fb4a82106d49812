"""What a forecast is computed from: the problem of a job's run, of its output layer or of its linearised twin."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from torch import Tensor

from foretune.dynamics.arguments import in_order
from foretune.dynamics.forecast import ForecastProblem, Variant
from foretune.dynamics.head_problem import head_problem
from foretune.dynamics.linearised import Tangent, WeightSpace
from foretune.dynamics.margin_model import Anchored
from foretune.dynamics.relinearise import MOST_CONTROLLED, MOST_PASSES, Relinearisation, affordable_interval
from foretune.features.unembedding import read_states
from foretune.models.head import head_of
from foretune.objectives import Objective, RankingObjective, SidedObjective, unpaired_order
from foretune.objectives.base import FloatArray
from foretune.verbs.audit import features_of, measure, reference_margins, store_of
from foretune.verbs.job import Job
from foretune.verbs.prepare import Prepared, loss_of_pairs
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import pilot
from foretune.verbs.twin import Lineariser


def output_layer_problem(
    prepared: Prepared, objective: Objective | SidedObjective | RankingObjective, progress: Progress
) -> ForecastProblem:
    """The run of the output layer alone: exact for runs that train it alone."""
    job, measured = prepared.job, measure(prepared, features_of(prepared, progress))
    convention = job.convention._replace(reference=True)  # margins are against the reference, whatever the loss sees
    head, states = head_of(prepared.loaded.model), read_states(store_of(prepared), prepared.pairs.num_states)
    exact = head_problem(head, states, prepared.pairs, convention=convention)
    alone, sided = job.ours.forecast_alone is not False, isinstance(objective, SidedObjective)
    reference = exact.reference.double().cpu().numpy()
    return ForecastProblem(
        exact,
        head_problem(head, states, prepared.pairs, mass=job.ours.alone_mass, convention=convention, sided=sided)
        if alone
        else None,
        None if job.convention.per_token or job.ranking_loss or sided else measured.kernel_features,
        reference[0] - reference[1],
        *_common(prepared, objective),
    )


def _common(prepared: Prepared, objective: Objective | SidedObjective | RankingObjective) -> tuple[Any, ...]:
    """The fields of a forecast's problem that do not depend on what simulates it, in their order."""
    loss, train, arguments = loss_of_pairs(prepared, objective), prepared.train_pairs, prepared.job.training
    if prepared.unpaired:
        train, arguments = train[unpaired_order(len(train), arguments)], in_order(arguments)
    return (
        prepared.pairs.pair_id,
        prepared.behaviour_of,
        prepared.split_of,
        prepared.weights,
        train,
        prepared.observed,
        loss,
        arguments,
        prepared.job.ours.observations,
        not prepared.job.convention.reference,
    )


def twin_problem(
    prepared: Prepared,
    objective: Objective | SidedObjective | RankingObjective,
    progress: Progress,
    lineariser: Lineariser,
    *,
    pilot_folder: str,
) -> ForecastProblem:
    """The run of adapters or all weights, in first order around where features were taken."""
    job, features = prepared.job, features_of(prepared, progress)
    share = job.ours.pilot_fraction
    begun = pilot(prepared, progress, fraction=share, folder=pilot_folder) if share else None
    if begun is None:
        margins = lineariser.at(0)
    else:
        lineariser.load(begun.checkpoint)
        margins = lineariser.at(begun.step)
    step = begun.step if begun else 0
    ours = job.ours
    steps = max(job.num_steps(prepared.num_train_units) - step, 1)
    renewal = Relinearisation(
        margins,
        step,
        lineariser.at,
        lineariser.measured,
        prepared.behaviour_of[lineariser.measured],
        every=_interval(job, lineariser, steps),
        tolerance=ours.relinearise_tolerance,
        shortest=min(ours.relinearise_every or steps, ceil(steps / MOST_CONTROLLED)),
        longest=_longest(job, steps),
    )
    return ForecastProblem(
        margins,
        margins if ours.forecast_alone else None,
        None,
        reference_margins(prepared, features),
        *_common(prepared, objective),
        checkpoint=begun and begun.checkpoint,
        past=begun and begun.past,
        renewal=renewal,
        variants=lambda: _variants(prepared, lineariser, step),
        place=lineariser.place[: len(prepared.pairs)],
        measured=lineariser.measured,
        looked=lineariser.looked,
        look=partial(_look, prepared, lineariser, renewal),
    )


def _look(
    prepared: Prepared, lineariser: Lineariser, renewal: Relinearisation, parameters: Mapping[str, Tensor]
) -> FloatArray | None:
    """Scores of the observed pairs where some are not measured and the weights followed features of the way."""
    if not renewal.drifts or np.isin(prepared.observed, lineariser.measured).all():
        return None
    return lineariser.look(parameters)


def planned_cost(prepared: Prepared, lineariser: Lineariser) -> float:
    """Rows that pilot and features will read at least, over those of the run."""
    job = prepared.job
    steps = job.num_steps(prepared.num_train_units)
    begun = round(steps * job.ours.pilot_fraction)
    left = max(steps - begun, 1)
    every = _longest(job, left) if job.ours.relinearise_tolerance else _interval(job, lineariser, left) or left
    return begun / steps + ceil(left / every) * lineariser.num_measured / (steps * job.rows_per_step)


def _interval(job: Job, lineariser: Lineariser, num_steps: int) -> int:
    """Steps between passes: as asked for, else what the run can afford."""
    ours = job.ours
    if ours.relinearise_every is not None:
        return ours.relinearise_every
    if ours.relinearise_tolerance or not lineariser.renewable:
        return 0
    return affordable_interval(num_steps, job.rows_per_step, lineariser.num_measured)


def _longest(job: Job, num_steps: int) -> int:
    """Interval between passes under step control."""
    return max(job.ours.relinearise_every or 0, ceil(num_steps / MOST_PASSES))


def _variants(prepared: Prepared, lineariser: Lineariser, first: int) -> list[Variant]:
    """The run from other seeds: batch order, dropout, adapters, sampled coordinates, pairs that stand for others."""
    anchors, found = lineariser.anchors, []
    for number in range(1, prepared.job.ours.band_runs + 1):
        seed = prepared.job.training.seed + number
        place = lineariser.stand_ins(draw=np.random.default_rng(number))

        def at(step: int, _parameters: Any = None, number: int = number, place: np.ndarray = place) -> Anchored | None:
            anchor = anchors.get(step)
            if isinstance(anchor, Tangent):
                anchor = anchor.redrawn(number)
            return anchor and anchor._replace(place=place)

        start = at(first)
        assert start is not None
        if isinstance(start, WeightSpace) and start.unchanged:
            start = start.starting_at(lineariser.drawn_anew(seed))
        found.append(Variant(start, at, seed))
    return found
