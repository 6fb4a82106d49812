"""R7: of two behaviours trained together, the one of higher priority is learned first."""

from itertools import combinations

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import PAPER, Check, Claim, Evidence, Plot, Series, above
from foretune.claims.intervals import over_pairs, rank_correlation, spearman
from foretune.claims.study import MIN_BEHAVIOURS, PAPER_PAIR, Behaviour, Study
from foretune.objectives import DPO
from foretune.statistics.priority import differences_kernel, priority_levels

MOST = 12


def run(study: Study) -> Evidence:
    """All pairs of a dozen behaviours, the paper's own pair, and all behaviours at once."""
    everything, setting = study.at_least(MIN_BEHAVIOURS), last_layer.PAPER
    few = study.spread(MOST)
    paper = [item for name in PAPER_PAIR for item in everything if item.name == name]
    few += [item for item in paper if item.name not in {other.name for other in few}]
    pairs = np.array(list(combinations(range(len(few)), 2)))
    found = [_gap_and_disparity([few[first], few[second]]) for first, second in pairs]
    gap, disparity = np.array(found).T
    levels, fallen = _together(everything)
    checks = [
        Check(
            "share of pairs of behaviours in which the one of higher priority has the lower loss",
            over_pairs(lambda drawn: float(np.mean(gap[drawn] * disparity[drawn] > 0)), pairs),
            above(0.75, nothing=0.5),
        ),
        Check(
            "Spearman of the gap in priority and the disparity of the losses, over pairs",
            over_pairs(lambda drawn: float(rank_correlation(np.abs(gap[drawn]), np.abs(disparity[drawn]))), pairs),
            above(0.5),
        ),
        Check(
            f"Spearman of priority and fall of the loss, all {len(everything)} behaviours together",
            spearman(levels, fallen),
            above(0.5),
        ),
    ]
    shown = paper if len(paper) == 2 else [few[0], few[-1]]
    plots = [
        Plot(
            "step",
            "loss",
            [
                Series(item.name, list(range(setting.steps + 1)), loss.tolist(), mode="lines")
                for item, loss in zip(shown, _joint_losses(shown), strict=True)
            ],
            ("The paper's pair" if shown is paper else "The least and the most distinguishable behaviour")
            + ", trained together.",
        ),
        Plot(
            "gap in priority, relative",
            "disparity of the losses after training",
            [
                Series(
                    "pair of behaviours", np.abs(gap).tolist(), (np.sign(gap) * disparity).tolist(), _names(few, pairs)
                )
            ],
            "Each dot is a pair trained together: above 0 the one of higher priority is ahead.",
        ),
    ]
    words = {"pairs of behaviours": len(pairs), "behaviours": len(everything)}
    return Evidence(checks, plots, last_layer.SETTINGS | words)


def _names(few: list[Behaviour], pairs: np.ndarray) -> list[str]:
    return [f"{few[first].name} / {few[second].name}" for first, second in pairs]


def _gap_and_disparity(pair: list[Behaviour]) -> tuple[float, float]:
    """(p_1 − p_2)/max ‖Δ‖ and how much lower the first one's loss ends."""
    levels = _levels(pair)
    losses = [loss[-1] for loss in _joint_losses(pair)]
    return (levels[0] - levels[1]) / max(item.distance for item in pair), losses[1] - losses[0]


def _together(group: list[Behaviour]) -> tuple[np.ndarray, np.ndarray]:
    return _levels(group), np.array([loss[0] - loss[-1] for loss in _joint_losses(group)])


def _levels(group: list[Behaviour]) -> np.ndarray:
    shares, names = np.full(len(group), 1 / len(group)), [item.name for item in group]
    return priority_levels(differences_kernel(np.array([item.difference for item in group]), shares, behaviours=names))


def _joint_losses(group: list[Behaviour]) -> list[np.ndarray]:
    """Losses of behaviours trained together with equal shares, each of shape (steps + 1,)."""
    path = joint_path(group, last_layer.PAPER)
    objective = DPO(beta=last_layer.PAPER.beta)
    return [objective.value(path @ item.phi.T).mean(1) for item in group]


def joint_path(group: list[Behaviour], setting: last_layer.Setting, shares: np.ndarray | None = None) -> np.ndarray:
    """The path of weights, (steps + 1, hidden), of behaviours trained together with these shares (equal by default)."""
    shares = np.ones(len(group)) if shares is None else shares
    weights = np.concatenate(
        [np.full(len(item.sign), share / len(item.sign)) for item, share in zip(group, shares, strict=True)]
    )
    return last_layer.descent(np.concatenate([item.phi for item in group]), setting, weights)


CLAIM = Claim(
    "R7",
    "Priority decides the order",
    "Of behaviours trained together, the one of higher priority is learned first; a larger gap in priority gives a "
    "larger disparity.",
    PAPER,
    run,
)
