"""R13: the equal-rate mixture narrows the gap between behaviours."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, Check, Claim, Evidence, Plot, Series, below
from foretune.claims.intervals import mean
from foretune.claims.priority import joint_path
from foretune.claims.study import MIN_BEHAVIOURS, Behaviour, Study
from foretune.objectives import DPO
from foretune.statistics.priority import behaviour_kernel, equal_rate_mixture

TOGETHER, GROUPS = 4, 40


def run(study: Study) -> Evidence:
    """Random groups of four behaviours, trained with equal shares and with those of the mixture."""
    behaviours, generator = study.at_least(MIN_BEHAVIOURS), np.random.default_rng(0)
    groups = [
        [behaviours[index] for index in generator.choice(len(behaviours), TOGETHER, replace=False)]
        for _ in range(GROUPS)
    ]
    found = np.array([_gaps(group) for group in groups])
    early, late = (found[:, :, moment] for moment in (0, 1))
    change = np.log(found[:, 1] / found[:, 0])
    checks = [
        Check(
            f"{when}: mean log ratio of the gap between behaviours, equal-rate over equal shares",
            mean(change[:, moment]),
            below(0.0),
            OURS,
        )
        for moment, when in enumerate(("first step", "end"))
    ]
    plot = Plot(
        "gap with equal shares",
        "gap with the equal-rate mixture",
        [
            Series(
                when,
                values[:, 0].tolist(),
                values[:, 1].tolist(),
                [", ".join(item.name for item in group) for group in groups],
            )
            for when, values in (("first step", early), ("end", late))
        ],
        "Each dot is a group of four behaviours; below the line the mixture narrows the gap between the best and the "
        "worst learned.",
        log=True,
        diagonal=True,
    )
    words = {"groups": GROUPS, "behaviours in a group": TOGETHER}
    return Evidence(checks, [plot], last_layer.SETTINGS | words)


def _gaps(group: list[Behaviour]) -> np.ndarray:
    """Largest less smallest fall of the loss: rows equal shares, mixture; columns first step, end; shape (2, 2)."""
    owner = np.repeat([item.name for item in group], [len(item.sign) for item in group])
    phi = np.concatenate([item.phi for item in group])
    kernel = behaviour_kernel(phi, owner, np.ones(len(phi)), behaviours=[item.name for item in group])
    objective, found = DPO(beta=last_layer.PAPER.beta), []
    for shares in (np.ones(len(group)), equal_rate_mixture(kernel)):
        path = joint_path(group, last_layer.PAPER, shares)
        losses = np.array([objective.value(path @ item.phi.T).mean(1) for item in group])
        found.append([np.ptp(losses[:, 1]), np.ptp(losses[:, -1])])
    return np.array(found)


CLAIM = Claim(
    "R13",
    "The equal-rate mixture evens behaviours out",
    "With the weights that start all behaviours equally fast, the gap between the best and the worst learned is "
    "smaller than with equal weights.",
    OURS,
    run,
)
