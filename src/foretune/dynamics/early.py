"""What the closed forms say of one behaviour that is trained alone, and which of their hypotheses fail on its data."""

import numpy as np

from foretune.dynamics.accuracy import EarlyAccuracy
from foretune.dynamics.bounds import (
    largest_curvature,
    loss_drop_bound,
    loss_drop_floor,
    objective_failures,
    step_failures,
    weight_change_bound,
)
from foretune.dynamics.closed_form import initial_loss_rate, initial_margin_rate
from foretune.objectives import Objective
from foretune.statistics.hypotheses import Checked
from foretune.statistics.moments import RowSource
from foretune.statistics.samples import mean_of_rows
from foretune.statistics.tails import tail_along

# Classes whose shares differ by more are named as unbalanced: the first step is then along a mean that is not Δ/2.
BALANCE = 0.1


def early_theory(
    features: RowSource,
    classes: tuple[RowSource, RowSource] | None,
    objective: Objective,
    *,
    time: float,
    learning_rate: float = 0.0,
) -> Checked[dict[str, float]]:
    """What the closed forms say of one behaviour trained alone by gradient flow; all rows, read in blocks.

    Args:
        features: φ of its training pairs, shape (n, dim).
        classes: hidden states of D+ and D−, shapes (n₊, dim) and (n₋, dim), two rows at least; None: no two classes.
        objective: the loss.
        time: Σ learning rates of the run.
        learning_rate: the largest one, to tell whether steps are small enough for the bounds.

    Returns:
        initial_loss_rate and initial_margin_rate per unit of time (T1); weight_change_bound, loss_drop_bound and
        loss_drop_floor at `time` (T2, the last where the loss has a curvature); linear_deviation at `time` (T3); for
        Yes/No behaviours early_accuracy (Gaussian classes) and guaranteed_accuracy (any distribution) (T5), where
        states have a spread subexponential_accuracy (their estimated tails), the smaller tail_index and the larger
        tail_norm of both classes. With them the hypotheses that fail.
    """
    length = float(np.linalg.norm(mean_of_rows(features)))
    curvature = largest_curvature(features, objective)
    found = {
        "initial_loss_rate": initial_loss_rate(length, objective),
        "initial_margin_rate": initial_margin_rate(length, objective),
        "weight_change_bound": float(weight_change_bound(np.array(time), length, objective)),
        "loss_drop_bound": float(loss_drop_bound(np.array(time), length, objective)),
        "linear_deviation": curvature / 2 * time,
    }
    if curvature > 0:
        found["loss_drop_floor"] = float(loss_drop_floor(np.array(time), length, curvature, objective))
    failed = objective_failures(objective) + step_failures(learning_rate, curvature)
    if found["linear_deviation"] > 1:
        failed += (f"growth is no longer linear: deviation up to {found['linear_deviation']:.3g} by the end",)
    if classes is not None:
        accuracies = _accuracies(*classes)
        found, failed = found | accuracies.value, failed + accuracies.failed
    return Checked(found, failed)


def _accuracies(plus: RowSource, minus: RowSource) -> Checked[dict[str, float]]:
    accuracy = EarlyAccuracy.of_classes(plus, minus)
    tails = [tail_along(rows, mean_of_rows(plus) - mean_of_rows(minus)) for rows in (plus, minus)]
    found = {"early_accuracy": accuracy.gaussian(), "guaranteed_accuracy": accuracy.guaranteed()}
    alphas, norms = zip(*[(tail.value.alpha, tail.value.norm) for tail in tails], strict=True)
    if np.isfinite(alphas).all():
        found["subexponential_accuracy"] = accuracy.subexponential(alphas=alphas, norms=norms)
        found |= {"tail_index": min(alphas), "tail_norm": max(norms)}
    failed = []
    share = len(plus) / (len(plus) + len(minus))
    if abs(2 * share - 1) > BALANCE:
        failed.append(f"classes are unbalanced: {max(share, 1 - share):.0%} prefer one answer")
    if min(accuracy.rooms) <= 0:
        failed.append("the states are not centred: the mean of one class lies on the wrong side of the first boundary")
    for name, tail in zip(("preferring one answer", "preferring the other"), tails, strict=True):
        failed += [f"states {name}: {words}" for words in tail.failed]
    return Checked(found, tuple(failed))
