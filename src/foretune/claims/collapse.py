"""R4: loss curves depend on β²η alone."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, Check, Claim, Estimate, Evidence, Plot, Series, never_above
from foretune.claims.study import Study


def run(study: Study) -> Evidence:
    """The paper's setting against others of the same β²η, and against one of the same βη."""
    paper = last_layer.PAPER
    same = {
        "β × 10, η / 100": paper._replace(beta=paper.beta * 10, learning_rate=paper.learning_rate / 100),
        "β / 2, η × 4": paper._replace(beta=paper.beta / 2, learning_rate=paper.learning_rate * 4),
        "η / 2, twice the steps": paper._replace(learning_rate=paper.learning_rate / 2, steps=paper.steps * 2),
    }
    other = paper._replace(beta=paper.beta * 2, learning_rate=paper.learning_rate / 2)
    reference = _losses(study, paper)
    checks = [
        Check(
            f"largest difference of loss curves over the fall of the loss, {words}",
            Estimate.exact(_largest(reference, _losses(study, setting))),
            never_above(0.01),
            OURS,
        )
        for words, setting in same.items()
    ]
    different = Estimate.exact(_largest(reference, _losses(study, other)))
    checks.append(Check("control: the same with the same βη instead (β × 2, η / 2)", different))
    index = [item.name for item in study.behaviours].index(study.five()[-1].name)
    runs = {"the paper's β and η": paper, **same, "same βη: β × 2, η / 2": other}
    lines = []
    for words, setting in runs.items():
        share = np.linspace(0, 1, setting.steps + 1)
        lines.append(Series(words, share.tolist(), _losses(study, setting)[index].tolist(), mode="lines"))
    caption = f"Loss of {study.behaviours[index].name}: runs of the same β²η × steps lie on one curve."
    plot = Plot("share of the run", "loss", lines, caption)
    return Evidence(checks, [plot], last_layer.SETTINGS | {"behaviours": len(study.behaviours)})


def _losses(study: Study, setting: last_layer.Setting) -> np.ndarray:
    return np.array([course.loss for course in last_layer.alone(study, setting)])


def _largest(left: np.ndarray, right: np.ndarray) -> float:
    """Over behaviours and common times, relative to each behaviour's fall; shapes (behaviours, steps + 1)."""
    right = right[:, :: (right.shape[1] - 1) // (left.shape[1] - 1)]
    return float(np.max(np.abs(left - right).max(1) / (np.log(2) - left.min(1))))


CLAIM = Claim(
    "R4",
    "Curves collapse in β²η",
    "Runs with the same β²η × step have the same loss, whatever β and the learning rate η are.",
    OURS,
    run,
)
