"""How far a linearised forecast may be trusted, behaviour by behaviour: a rule of thumb of our own.

First order is good where margins move little between anchors. Where features were taken anew on the way, the relative
error of the last extrapolation is known; where they were not, the size of the scaled margin β·m that the forecast
reaches stands for it.
"""

from collections.abc import Collection, Mapping

import numpy as np

from foretune.dynamics.relinearise import Drift
from foretune.objectives.base import FloatArray

HIGH, MEDIUM = 0.25, 0.6
# From the 5th to the 95th percentile of observed less forecast loss at the end of runs, in units of the mean change of
# the losses that was forecast: of tuning behaviours (docs/fidelity.md has how many losses of test behaviours it holds).
LIKELY_ERRORS = {"high": (-0.45, 0.3), "medium": (-0.9, 0.5), "low": (-1.0, 0.8)}


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


def likely_errors(words: Mapping[str, str], changes: Collection[float]) -> dict[str, tuple[float, float]]:
    """Between which two values nine in ten of the observed losses less the forecast ones should lie, by behaviour.

    Args:
        words: of `confidence`.
        changes: of each behaviour's loss from the start to the end of the forecast.
    """
    scale = float(np.mean(np.abs([*changes])))
    ends = {word: (scale * low, scale * high) for word, (low, high) in LIKELY_ERRORS.items()}
    return {name: ends[word] for name, word in words.items()}
