"""How far a linearised forecast may be trusted, behaviour by behaviour: a rule of thumb of our own.

First order is good where margins move little between anchors. Where features were taken anew on the way, the relative
error of the last extrapolation is known; where they were not, the size of the scaled margin β·m that the forecast
reaches stands for it.
"""

from collections.abc import Collection

import numpy as np

from foretune.dynamics.relinearise import Drift
from foretune.objectives.base import FloatArray

HIGH, MEDIUM = 0.25, 0.6
# From the least to the largest error of tuning runs (observed less forecast loss at the end, in units of the mean
# change that was forecast), by how often features were taken at least; docs/fidelity.md has what it holds of others.
LIKELY_ERRORS = {5: (-0.48, 0.65), 1: (-1.1, 0.92)}


def confidence(
    change: FloatArray, behaviour_of: np.ndarray, drifts: list[Drift], *, beta: float
) -> dict[str, tuple[str, float]]:
    """A word ("high", "medium", "low") and the figure it stands on, for each behaviour.

    Args:
        change: of the margins since the first anchor, at the end of the forecast, shape (n,).
        behaviour_of: shape (n,).
        drifts: what was found at later anchors; may be empty.
        beta: of the loss.
    """
    found = {}
    for name in map(str, np.unique(behaviour_of)):
        reached = beta * float(np.sqrt(np.mean(change[behaviour_of == name] ** 2)))
        score = drifts[-1].errors[name] if drifts else reached
        found[name] = ("high" if score <= HIGH else "medium" if score <= MEDIUM else "low", score)
    return found


def likely_error(changes: Collection[float], num_anchors: int) -> tuple[float, float]:
    """Between which two values most of the observed losses less the forecast ones should lie.

    Args:
        changes: of each behaviour's loss from the start to the end of the forecast.
        num_anchors: how often features were taken.
    """
    scale = float(np.mean(np.abs([*changes])))
    low, high = next(ends for least, ends in LIKELY_ERRORS.items() if num_anchors >= least)
    return scale * low, scale * high
