"""R1: the output layer moves farther for behaviours that are easier to distinguish."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, PAPER, Check, Claim, Estimate, Evidence, Plot, Series, above, near
from foretune.claims.intervals import mean, spearman
from foretune.claims.prompts import distances_with_newline
from foretune.claims.study import MIN_BEHAVIOURS, Behaviour, Study, features

SMALL = 50


def run(study: Study) -> Evidence:
    """Each behaviour alone in the paper's setting; permuted, unbalanced, Adam and newline controls."""
    behaviours, setting = study.at_least(MIN_BEHAVIOURS), last_layer.PAPER
    distance = np.array([item.distance for item in behaviours])
    courses = last_layer.alone(study, setting)
    change = np.array([course.weight_change for course in courses])
    theory = setting.beta * setting.learning_rate * distance / (2 * np.sqrt(2))
    slope = change[:, 1] / theory
    adam = np.array(
        [
            last_layer.adam_weight_change(item.phi, beta=0.01, learning_rate=1e-3, steps=setting.steps)
            for item in behaviours
        ]
    )
    checks = [
        Check(f"Spearman of ‖Δ‖ and ‖ΔW‖ after {setting.steps} steps", spearman(distance, change[:, -1]), above(0.9)),
        Check(
            "first step of ‖ΔW‖ over βη‖Δ‖/2√2 (mean, range over behaviours)",
            Estimate(slope.mean(), slope.min(), slope.max()),
            near(1, 0.01),
            OURS,
        ),
        Check(
            "control, permuted labels: ‖ΔW‖ over that of the true labels",
            mean(np.array([_permuted(item) for item in behaviours]) / change[:, -1]),
        ),
        Check(
            "control, three of one answer to one of the other: first step of ‖ΔW‖ over βη‖Δ‖/2√2",
            mean(np.array([_unbalanced(item) for item in behaviours])),
        ),
        Check(
            "control, Adam: largest over smallest ‖ΔW‖ after one step",
            Estimate.exact(adam[:, 1].max() / adam[:, 1].min()),
        ),
        Check(
            "control, SGD: largest over smallest ‖ΔW‖ after one step",
            Estimate.exact(change[:, 1].max() / change[:, 1].min()),
        ),
        Check(f"control, Adam: Spearman of ‖Δ‖ and ‖ΔW‖ after {setting.steps} steps", spearman(distance, adam[:, -1])),
    ]
    few = study.spread(8)
    newline = distances_with_newline(study, few, rows=SMALL)
    if newline is not None:
        plain = np.array([item.first(SMALL).distance for item in few])
        checks.append(
            Check("control, newline after the prompt: Spearman of ‖Δ‖ with and without", spearman(plain, newline))
        )
        checks.append(Check("control, newline after the prompt: ‖Δ‖ with over without", mean(newline / plain)))
    names = [item.name for item in behaviours]
    five = {item.name for item in study.five()}
    plots = [
        Plot(
            "distinguishability ‖Δ‖",
            f"‖ΔW‖ after {setting.steps} steps",
            [Series("behaviour", distance.tolist(), change[:, -1].tolist(), names)],
            "Each dot is a behaviour trained alone: the farther apart its two sides, the farther the weights move.",
        ),
        Plot(
            "step",
            "‖ΔW‖",
            [
                Series(
                    f"{item.name} (‖Δ‖ {item.distance:.2f})",
                    list(range(setting.steps + 1)),
                    found.tolist(),
                    mode="lines",
                )
                for item, found in zip(behaviours, change, strict=True)
                if item.name in five
            ],
            "The weights of five behaviours along the run.",
        ),
    ]
    return Evidence(checks, plots, last_layer.SETTINGS | {"behaviours": len(behaviours)})


def _permuted(item: Behaviour) -> float:
    """‖ΔW‖ at the end where the labels say nothing."""
    sign = np.random.default_rng(0).permutation(item.sign)
    return float(np.linalg.norm(last_layer.descent(features(item.states, sign), last_layer.PAPER)[-1]))


def _unbalanced(item: Behaviour) -> float:
    """The first step over the balanced theory's, where a third of one answer's rows are left."""
    minus = np.flatnonzero(item.sign < 0)
    kept = np.sort(np.concatenate([np.flatnonzero(item.sign > 0), minus[: max(len(minus) // 3, 1)]]))
    few = item._replace(members=item.members[kept], states=item.states[kept], sign=item.sign[kept])
    setting = last_layer.PAPER._replace(steps=1)
    step = float(np.linalg.norm(last_layer.descent(few.phi, setting)[-1]))
    return step / (setting.beta * setting.learning_rate * few.distance / (2 * np.sqrt(2)))


CLAIM = Claim(
    "R1",
    "Weights move with distinguishability",
    "Trained alone by SGD on the output layer, the weights move the farther the larger ‖Δ‖, at first at the rate "
    "βη‖Δ‖/2√2.",
    PAPER,
    run,
)
