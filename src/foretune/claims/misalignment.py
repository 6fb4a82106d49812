"""R9: flipped labels are learned faster from the aligned model than from the base model."""

import numpy as np

from foretune.claims import last_layer, tuning
from foretune.claims.claim import OURS, PAPER, Check, Claim, Estimate, Evidence, Plot, Series, above, near
from foretune.claims.dialogue import faster, flipped_plot
from foretune.claims.intervals import mean
from foretune.claims.study import Behaviour, Study
from foretune.objectives import DPO


def run(study: Study) -> Evidence:
    """Real runs from both starts, whose features change; and the output layer alone, where the ratio of speeds is 1."""
    five = [item.first(tuning.rows_of(study)) for item in study.five()]
    checks, plots, settings = [], [], {}
    for trainable in tuning.trainables(study):
        what = tuning.WORDS[trainable]
        settings |= {f"{what}: {name}": value for name, value in tuning.settings_of(study, trainable).items()}
        beta = settings[f"{what}: β"]
        lives = {item.name: tuning.misaligned(study, item.members, trainable) for item in five}
        more = np.array([faster(life, beta).mean() for life in lives.values()])
        grown = [tuning.aligned(study, item, trainable).distances[:, -1] for item in five]
        predicted = np.array([(after / before) ** 2 - 1 for before, after in grown])
        checks += [
            Check(
                f"{what}: fall of the flipped loss, aligned less base, over the base's (averaged along the run)",
                mean(more),
                above(0.0),
                PAPER,
            ),
            Check(f"control, {what}: the same as (‖Δ_aligned‖/‖Δ_base‖)² − 1 predicts", mean(predicted)),
        ]
        plots.append(flipped_plot(lives, beta, what))
    frozen, plot = _frozen(study)
    return Evidence([*checks, frozen], [*plots, plot], settings | {"behaviours": len(five)})


def _frozen(study: Study) -> tuple[Check, Plot]:
    setting, five = last_layer.PAPER, study.five()
    pairs = [_flipped(study, item, setting) for item in five]
    ratio = np.array([(base[0] - base[-1]) / (aligned[0] - aligned[-1]) for base, aligned in pairs])
    steps = list(range(setting.steps + 1))
    check = Check(
        "output layer alone: fall of the flipped loss, aligned over base (mean, range over behaviours)",
        Estimate(ratio.mean(), ratio.min(), ratio.max()),
        near(1, 0.01),
        OURS,
    )
    plot = Plot(
        "step",
        "loss of the flipped labels",
        [
            Series(f"{item.name}, from {start}", steps, loss.tolist(), mode="lines", dashed=start == "aligned")
            for item, losses in zip(five, pairs, strict=True)
            for start, loss in zip(("base", "aligned"), losses, strict=True)
        ],
        "The output layer alone: both starts give one curve.",
    )
    return check, plot


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
    PAPER,
    run,
)
