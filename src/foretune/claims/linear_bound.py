"""R2: the linear bound of the weights' growth is never violated."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, PAPER, Check, Claim, Estimate, Evidence, Plot, Series, never_above
from foretune.claims.study import Study
from foretune.dynamics.bounds import loss_drop_bound, weight_change_bound
from foretune.objectives import DPO

ROUNDING = 1e-9


def run(study: Study) -> Evidence:
    """All behaviours, in the paper's setting and with the largest step for which the bound is proven."""
    settings = {"paper's": last_layer.PAPER, "longest": _largest_step(study)}
    checks, lines = [], []
    for name, setting in settings.items():
        times = setting.learning_rate * np.arange(1.0, setting.steps + 1)
        objective, weights, losses = DPO(beta=setting.beta), [], []
        for item, course in zip(study.behaviours, last_layer.alone(study, setting), strict=True):
            length = float(np.linalg.norm(item.phi.mean(0)))
            weights.append(course.weight_change[1:] / weight_change_bound(times, length, objective))
            losses.append((np.log(2) - course.loss[1:]) / loss_drop_bound(times, length, objective))
        for what, ratio, source in (("‖ΔW‖", weights, PAPER), ("fall of the loss", losses, OURS)):
            found = Estimate.exact(np.max(ratio))
            checks.append(
                Check(f"largest {what} over its bound, {name} setting", found, never_above(1 + ROUNDING), source)
            )
        five = [item.name for item in study.five()]
        steps = list(range(1, setting.steps + 1))
        lines.append(
            Plot(
                f"step ({setting.words})",
                "‖ΔW‖ over its linear bound",
                [
                    Series(item.name, steps, ratio.tolist(), mode="lines")
                    for item, ratio in zip(study.behaviours, weights, strict=True)
                    if item.name in five
                ],
                "1 is the bound: growth is linear at first, then slower.",
            )
        )
    words = {"behaviours": len(study.behaviours), "settings": "; ".join(setting.words for setting in settings.values())}
    return Evidence(checks, lines, last_layer.SETTINGS | words)


def _largest_step(study: Study) -> last_layer.Setting:
    """η = 4/(β²λ), λ the largest eigenvalue of a behaviour's second moment."""
    beta = 0.1
    # λ of φ = √2 s x is twice that of x
    largest = max(np.linalg.norm(item.states, 2) ** 2 / len(item.states) for item in study.behaviours)
    return last_layer.Setting(beta, float(4 / (beta**2 * largest)), 300)


CLAIM = Claim(
    "R2",
    "Growth is at most linear",
    "At every step ‖ΔW‖ ≤ tβ‖m‖/√2, and the loss has fallen by at most β²‖m‖²t/2.",
    PAPER,
    run,
)
