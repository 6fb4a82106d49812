"""R5: accuracy rises faster and higher where the two sides lie far apart for their spread."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, PAPER, Check, Claim, Evidence, Plot, Series, above, below
from foretune.claims.intervals import mean, spearman
from foretune.claims.study import MIN_BEHAVIOURS, Study
from foretune.dynamics.accuracy import EarlyAccuracy


def run(study: Study) -> Evidence:
    """Reward accuracy (margin above 0) early and along a long run, beside the closed form of Gaussian classes."""
    behaviours, setting = study.at_least(MIN_BEHAVIOURS), last_layer.LONG
    theory = [EarlyAccuracy.of_classes(item.states[item.sign > 0], item.states[item.sign < 0]) for item in behaviours]
    apart = np.array([2 * part.distance / (part.spread_plus + part.spread_minus) for part in theory])
    gaussian = np.array([part.gaussian() for part in theory])
    courses = last_layer.alone(study, setting)
    reward, output = (
        np.array([getattr(course, name) for course in courses]) for name in ("reward_accuracy", "output_accuracy")
    )
    test = np.array([course.test_accuracy[-1] for course in courses])
    checks = [
        Check("Spearman of ‖Δ‖/spread and reward accuracy after one step", spearman(apart, reward[:, 1]), above(0.5)),
        Check(
            "Spearman of ‖Δ‖/spread and mean reward accuracy over the run",
            spearman(apart, reward[:, 1:].mean(1)),
            above(0.5),
        ),
        Check("Spearman of ‖Δ‖/spread and reward accuracy at the end", spearman(apart, reward[:, -1]), above(0.5)),
        Check(
            "mean distance of the early reward accuracy from the Gaussian value",
            mean(np.abs(reward[:, 1] - gaussian)),
            below(0.02, nothing=0.02),
            OURS,
        ),
        Check("control: Spearman of ‖Δ‖/spread and output accuracy at the end", spearman(apart, output[:, -1])),
    ]
    if np.isfinite(test).all():
        checks.append(Check("control: Spearman of ‖Δ‖/spread and held-out reward accuracy", spearman(apart, test)))
    names, five = [item.name for item in behaviours], [item.name for item in study.five()]
    steps = list(range(setting.steps + 1))
    place = {item.name: index for index, item in enumerate(behaviours)}
    plots = [
        Plot(
            "step",
            "share of pairs",
            [
                Series(f"{name}, {kind}", steps, values[place[name]].tolist(), mode="lines", dashed=values is reward)
                for kind, values in (("output accuracy", output), ("reward accuracy", reward))
                for name in five
            ],
            "The paper's code logs output accuracy (the chosen answer is the likelier one), its theory speaks of "
            "reward accuracy (training moved the pair the right way).",
        ),
        Plot(
            "Gaussian value of the early reward accuracy",
            "reward accuracy after one step",
            [Series("behaviour", gaussian.tolist(), reward[:, 1].tolist(), names)],
            "The closed form of the early accuracy beside what happened.",
            diagonal=True,
        ),
    ]
    words = {"setting": setting.words, "behaviours": len(behaviours)}
    note = (
        "The first step moves along the mean of s·x. Where the two sides' means differ in length, it moves all pairs "
        "of one answer the right way and those of the other the wrong way: the early accuracy is then near one half, "
        "whatever ‖Δ‖ is."
    )
    return Evidence(checks, plots, last_layer.SETTINGS | words, [note])


CLAIM = Claim(
    "R5",
    "Accuracy rises with distinguishability over spread",
    "Reward accuracy rises faster and higher with ‖Δ‖ over the spread along it; its early value is that of Gaussian "
    "classes.",
    PAPER,
    run,
)
