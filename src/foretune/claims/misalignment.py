"""R9: flipped labels are learned faster from the aligned model than from the base model."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, Check, Claim, Estimate, Evidence, Plot, Series, near
from foretune.claims.study import Behaviour, Study
from foretune.objectives import DPO


def run(study: Study) -> Evidence:
    """With frozen features the ratio of the two speeds is 1."""
    setting, five = last_layer.PAPER, study.five()
    pairs = [_flipped(study, item, setting) for item in five]
    ratio = np.array([(base[0] - base[-1]) / (aligned[0] - aligned[-1]) for base, aligned in pairs])
    checks = [
        Check(
            "output layer alone: fall of the flipped loss from the aligned start over that from the base",
            Estimate(ratio.mean(), ratio.min(), ratio.max()),
            near(1, 0.01),
            OURS,
        )
    ]
    steps = list(range(setting.steps + 1))
    plot = Plot(
        "step",
        "loss of the flipped labels",
        [
            Series(f"{item.name}, from {start}", steps, loss.tolist(), mode="lines")
            for item, losses in zip(five, pairs, strict=True)
            for start, loss in zip(("base", "aligned"), losses, strict=True)
        ],
        "The output layer alone: both starts give one curve.",
    )
    return Evidence(checks, [plot], last_layer.SETTINGS | {"behaviours": len(five)})


def _flipped(study: Study, item: Behaviour, setting: last_layer.Setting) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the flipped labels along descent on the two rows of W, from the base's and from the aligned ones."""
    base = study.answer_rows
    aligned = _descend(item.states, item.sign, base, setting)[-1]
    return tuple(
        _losses(item.states, -item.sign, _descend(item.states, -item.sign, start, setting), setting)
        for start in (base, aligned)
    )  # pyright: ignore


def _descend(states: np.ndarray, sign: np.ndarray, start: np.ndarray, setting: last_layer.Setting) -> np.ndarray:
    """The rows of W along a run whose reference is its start, shape (steps + 1, 2, hidden)."""
    path, objective = [start], DPO(beta=setting.beta)
    for _ in range(setting.steps):
        pull = (objective.slope(_margins(states, sign, path[-1], start)) * sign) @ states / len(states)
        path.append(path[-1] - setting.learning_rate * np.stack([pull, -pull]))
    return np.array(path)


def _margins(states: np.ndarray, sign: np.ndarray, rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    ratio, of_reference = (states @ (part[0] - part[1]) for part in (rows, reference))
    return sign * (ratio - of_reference)


def _losses(states: np.ndarray, sign: np.ndarray, path: np.ndarray, setting: last_layer.Setting) -> np.ndarray:
    return np.array([DPO(beta=setting.beta).value(_margins(states, sign, rows, path[0])).mean() for rows in path])


CLAIM = Claim(
    "R9",
    "Aligned models are misaligned faster",
    "The loss of flipped labels falls faster from the aligned model than from the base; with frozen features equally "
    "fast.",
    OURS,
    run,
)
