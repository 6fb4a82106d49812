"""R1: the output layer moves farther for behaviours that are easier to distinguish."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, PAPER, Check, Claim, Estimate, Evidence, Plot, Series, above, near
from foretune.claims.code_differences import code_differences
from foretune.claims.intervals import mean, spearman
from foretune.claims.study import MIN_BEHAVIOURS, Behaviour, Study, features


def run(study: Study) -> Evidence:
    """Each behaviour alone in the paper's setting; permuted, unbalanced, Adam and code controls."""
    behaviours, setting = study.at_least(MIN_BEHAVIOURS), last_layer.PAPER
    distance = np.array([item.distance for item in behaviours])
    change = np.array([course.weight_change for course in last_layer.alone(study, setting)])
    slope = change[:, 1] / (setting.beta * setting.learning_rate * distance / (2 * np.sqrt(2)))
    checks = [
        Check(f"Spearman of ‖Δ‖ and ‖ΔW‖ after {setting.steps} steps", spearman(distance, change[:, -1]), above(0.9)),
        Check(
            "first step of ‖ΔW‖ over βη‖Δ‖/2√2 (mean, range over behaviours)",
            Estimate(slope.mean(), slope.min(), slope.max()),
            near(1, 0.01),
            OURS,
        ),
        *_controls(behaviours, distance, change),
        *code_differences(study),
    ]
    names, five = [item.name for item in behaviours], {item.name for item in study.five()}
    steps = list(range(setting.steps + 1))
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
                Series(f"{item.name} (‖Δ‖ {item.distance:.2f})", steps, found.tolist(), mode="lines")
                for item, found in zip(behaviours, change, strict=True)
                if item.name in five
            ],
            "The weights of five behaviours along the run.",
        ),
    ]
    return Evidence(checks, plots, last_layer.SETTINGS | {"behaviours": len(behaviours)})


def _controls(behaviours: list[Behaviour], distance: np.ndarray, change: np.ndarray) -> list[Check]:
    """What labels that say nothing, uneven answers and Adam do; `change`: ‖ΔW‖, (behaviours, steps + 1)."""
    permuted = np.array([_permuted(item) for item in behaviours])
    adam = np.array([np.linalg.norm(last_layer.adam_path(item.phi), axis=1) for item in behaviours])
    return [
        Check("control, permuted labels: ‖ΔW‖ over that of the true labels", mean(permuted / change[:, -1])),
        Check(
            "control, three of one answer to one of the other: first step of ‖ΔW‖ over βη‖Δ‖/2√2",
            mean(np.array([_unbalanced(item) for item in behaviours])),
        ),
        Check(
            "control, SGD: largest over smallest first step of ‖ΔW‖",
            Estimate.exact(change[:, 1].max() / change[:, 1].min()),
        ),
        Check(
            "control, Adam: largest over smallest first step of ‖ΔW‖",
            Estimate.exact(adam[:, 1].max() / adam[:, 1].min()),
        ),
        Check(
            f"control, Adam: Spearman of ‖Δ‖ and ‖ΔW‖ after {adam.shape[1] - 1} steps", spearman(distance, adam[:, -1])
        ),
    ]


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
