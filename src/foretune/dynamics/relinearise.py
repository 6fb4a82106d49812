"""When a simulated run takes its features anew (predictor–corrector), and how far it may be trusted.

Between two anchors margins are extrapolated, so at the second one the extrapolation can be compared with what is
measured there: the error of one step of an integrator, which chooses the next interval as ODE solvers do.
"""

from collections.abc import Callable, Mapping
from math import ceil, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretune.dynamics.margin_model import Anchored, all_margins
from foretune.objectives.base import FloatArray

# Of the interval that the error asks for, the part that is taken; and how much longer or shorter the next one may be.
SAFETY = 0.9
LONGEST_GROWTH, LONGEST_CUT = 2.0, 0.25
# Interval with which step control begins where none is named, and passes that it takes at most: margins are rounded,
# and of the little that they change from step to step this may be more than any tolerance.
FIRST_INTERVAL, MOST_CONTROLLED = 8, 20

# Where nothing is said: so many passes over the measured pairs at most, and so much of the run's rows altogether.
MOST_PASSES, LARGEST_COST = 5, 0.25
# Passes over FEWEST_PAIRS that are worth more than one over MOST_PAIRS.
WORTH_PASSES = 3
# Pairs of each behaviour and split that features are taken of (one pass alone: MOST_PAIRS), and that are observed.
FEWEST_PAIRS, ENOUGH_PAIRS, MOST_PAIRS = 10, 20, 50
# The same of free texts, which hardly stand for one another; and what one pass over all of them may cost.
MOST_TEXTS, LARGEST_COST_OF_ALL = 100, 0.5


def affordable_interval(num_steps: int, rows_per_step: int, num_measured: int) -> int:
    """Steps between passes such that all of them together stay small beside the run; 0: one pass, at the start.

    Args:
        num_steps: that are simulated.
        rows_per_step: rows of a real step.
        num_measured: pairs of which each pass takes features.

    >>> affordable_interval(500, 24, 600)
    100
    >>> affordable_interval(120, 24, 600)
    0
    """
    passes = min(MOST_PASSES, int(LARGEST_COST * num_steps * rows_per_step / num_measured))
    return ceil(num_steps / passes) if passes > 1 else 0


class NumPairs(NamedTuple):
    """Pairs of each behaviour and split that features are taken of, and that are observed."""

    measured: int
    observed: int


def affordable_pairs(num_rows: int, num_groups: int) -> NumPairs:
    """How many pairs to measure and to observe, few enough to take features anew on the way where a run is long.

    Args:
        num_rows: that the run trains on, each as often as it does.
        num_groups: behaviours, those of held-out pairs apart.

    >>> affordable_pairs(20_000, 40)
    NumPairs(measured=20, observed=25)
    >>> affordable_pairs(1_000, 40)
    NumPairs(measured=50, observed=50)
    """
    rows = LARGEST_COST * num_rows / num_groups
    if rows < WORTH_PASSES * FEWEST_PAIRS:
        return NumPairs(MOST_PAIRS, MOST_PAIRS)
    measured = min(max(int(rows / MOST_PASSES), FEWEST_PAIRS), ENOUGH_PAIRS)
    return NumPairs(measured, min(max(int(rows / MOST_PASSES), ENOUGH_PAIRS), MOST_PAIRS))


def affordable_texts(num_rows: float, sizes: NDArray[np.int64], *, once: bool) -> int:
    """How many free texts of each behaviour and split to measure: all, if one pass over them is affordable.

    What a text that stands for others learns by heart, each of them would learn of its own: rather pairs than passes.
    Where not all are measured, no more than leave room for a second pass, which tells what is learned by heart.

    Args:
        num_rows: that the run trains on, each as often as it does.
        sizes: of the behaviours, those of held-out pairs apart, shape (g,).
        once: there can be no second pass.

    >>> affordable_texts(1_440, np.array([100, 100, 100]), once=False)
    100
    >>> affordable_texts(20_000, np.array([5000, 5000, 1000, 1000]), once=False)
    100
    >>> affordable_texts(720, np.array([160, 160, 40, 40]), once=False)
    22
    """
    if sizes.max() <= MOST_TEXTS and sizes.sum() < LARGEST_COST_OF_ALL * num_rows:
        return int(sizes.max())
    reads = np.minimum.outer(np.arange(1, MOST_TEXTS + 1), sizes).sum(1)
    measured = int(np.sum((1 if once else 2) * reads <= LARGEST_COST * num_rows))
    return measured if measured >= (MOST_PAIRS if once else FEWEST_PAIRS) else MOST_PAIRS


class Drift(NamedTuple):
    """How far extrapolated margins were from those measured at an anchor.

    Attributes:
        since: step of the anchor before.
        step: of this anchor.
        error: root mean square error of the margins over the root mean square of their change, all pairs.
        errors: the same of each behaviour's pairs.
    """

    since: int
    step: int
    error: float
    errors: dict[str, float]


class Relinearisation:
    """Takes features anew every so many steps, or as often as `tolerance` asks for; a `Renewal` of `simulate_run`.

    Args:
        start: margins around the first anchor.
        step: of the first anchor.
        at: takes features: (step, parameters) → margins around them.
        observed: pairs that margins are compared on, shape (n,).
        behaviour_of: their behaviours, shape (n,).
        every: steps between anchors; with `tolerance` the first interval (0: FIRST_INTERVAL, or the shortest).
        tolerance: relative error of the margins that an interval may make; None: intervals stay as they are.
        shortest: with `tolerance` no interval is shorter.
        longest: with `tolerance` no interval is longer: a small error says little about steps far ahead.

    Attributes:
        drifts: what was found at each anchor.
    """

    def __init__(
        self,
        start: Anchored,
        step: int,
        at: Callable[[int, Mapping[str, Tensor]], Anchored],
        observed: np.ndarray,
        behaviour_of: np.ndarray,
        *,
        every: int = 0,
        tolerance: float | None = None,
        shortest: float = 1.0,
        longest: float = inf,
    ) -> None:
        """Nothing is taken yet."""
        self._model, self._since, self._at = start, step, at
        self._observed, self._behaviour_of = observed, behaviour_of
        self._tolerance, self._shortest, self._longest = tolerance, shortest, longest
        first = float(every or max(FIRST_INTERVAL, shortest))
        self._interval = min(first, longest) if tolerance else float(every)
        self.drifts: list[Drift] = []

    def __call__(self, step: int, parameters: Mapping[str, Tensor]) -> Anchored | None:
        """The margins around `parameters` where an anchor is due after `step`."""
        if not self._interval or step - self._since < round(self._interval):
            return None
        before, predicted = self._margins(self._model.start()), self._margins(parameters)
        self._model = self._at(step, parameters)
        drift = _drift(before, predicted, self._margins(parameters), self._behaviour_of, self._since, step)
        self.drifts.append(drift)
        self._since = step
        if self._tolerance:
            # the relative error of a first-order extrapolation grows in proportion to the interval
            change = SAFETY * self._tolerance / max(drift.error, 1e-12)
            self._interval *= min(max(change, LONGEST_CUT), LONGEST_GROWTH)
            self._interval = max(self._shortest, min(self._interval, self._longest))
        return self._model

    def _margins(self, parameters: Mapping[str, Tensor]) -> FloatArray:
        return all_margins(self._model, parameters, self._observed).double().cpu().numpy()


def _drift(
    before: FloatArray, predicted: FloatArray, found: FloatArray, behaviour_of: np.ndarray, since: int, step: int
) -> Drift:
    def relative(members: np.ndarray | slice) -> float:
        change = np.sqrt(np.mean((found - before)[members] ** 2))
        return float(np.sqrt(np.mean((predicted - found)[members] ** 2)) / change) if change else 0.0

    return Drift(
        since,
        step,
        relative(slice(None)),
        {str(name): relative(behaviour_of == name) for name in np.unique(behaviour_of)},
    )
