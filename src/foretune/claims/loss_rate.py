"""R3: the loss falls faster for behaviours that are easier to distinguish."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, PAPER, Check, Claim, Evidence, Plot, Series, above, near
from foretune.claims.intervals import log_slope, spearman
from foretune.claims.study import MIN_BEHAVIOURS, Study
from foretune.objectives import DPO


def run(study: Study) -> Evidence:
    """Each behaviour alone; the initial rate is measured by one tiny step."""
    behaviours, setting = study.at_least(MIN_BEHAVIOURS), last_layer.PAPER
    distance = np.array([item.distance for item in behaviours])
    loss = np.array([course.loss for course in last_layer.alone(study, setting)])
    longer = np.array([course.loss[-1] for course in last_layer.alone(study, last_layer.LONG)])
    rate = np.array([last_layer.initial_rate(item.phi, DPO(beta=setting.beta)) for item in behaviours])
    fallen = np.log(2) - loss
    checks = [
        Check(
            f"Spearman of ‖Δ‖ and the fall of the loss in {setting.steps} steps",
            spearman(distance, fallen[:, -1]),
            above(0.9),
        ),
        Check("slope of log initial rate on log ‖Δ‖", log_slope(distance, rate), near(2, 0.1), OURS),
        Check(
            f"control, long run ({last_layer.LONG.words}): Spearman of ‖Δ‖ and the fall of the loss",
            spearman(distance, np.log(2) - longer),
        ),
    ]
    names, five = [item.name for item in behaviours], [item.name for item in study.five()]
    plots = [
        Plot(
            "step",
            "loss",
            [
                Series(
                    f"{item.name} (‖Δ‖ {item.distance:.2f})",
                    list(range(setting.steps + 1)),
                    found.tolist(),
                    mode="lines",
                )
                for item, found in zip(behaviours, loss, strict=True)
                if item.name in five
            ],
            "The loss of five behaviours, each trained alone.",
        ),
        Plot(
            "distinguishability ‖Δ‖",
            "initial rate of the loss",
            [Series("behaviour", distance.tolist(), rate.tolist(), names)],
            "On logarithmic axes the rates lie on a line of slope 2.",
            log=True,
        ),
    ]
    return Evidence(checks, plots, last_layer.SETTINGS | {"behaviours": len(behaviours)})


CLAIM = Claim(
    "R3",
    "The loss falls faster with distinguishability",
    "Trained alone, the loss falls the faster the larger ‖Δ‖; the initial rate grows as ‖Δ‖².",
    PAPER,
    run,
)
