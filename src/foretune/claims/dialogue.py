"""R10: the same as R9 on answers of several tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.claims import tuning
from foretune.claims.claim import PAPER, Check, Claim, Evidence, Plot, Series, above
from foretune.claims.intervals import mean
from foretune.claims.study import Study

# Groups of dialogues at most.
MOST, MOST_QUICK = 4, 2


def run(study: Study) -> Evidence:
    """Flipped labels on dialogues, from the base model and from the one aligned on the same rows."""
    study = study.of_dialogue()
    checks, plots = [], []
    settings: dict[str, Any] = {"data": study.prepared.data.info.source}
    groups = dialogue_groups(study)
    for trainable in tuning.trainables(study):
        what = tuning.WORDS[trainable]
        settings |= {f"{what}: {name}": value for name, value in tuning.settings_of(study, trainable).items()}
        beta = settings[f"{what}: β"]
        lives = {name: tuning.misaligned(study, members, trainable) for name, members in groups.items()}
        checks.append(
            Check(
                f"{what}: fall of the flipped loss, aligned less base, over the base's (averaged along the run)",
                mean(np.concatenate([faster(life, beta) for life in lives.values()])),
                above(0.0),
            )
        )
        plots.append(flipped_plot(lives, beta, what))
    return Evidence(checks, plots, settings, ["Interval: bootstrap of pairs; behaviours of dialogue data are few."])


def dialogue_groups(study: Study) -> dict[str, NDArray[np.int64]]:
    """The first training pairs of the first behaviours, by name."""
    groups = {}
    for index, name in enumerate(study.prepared.pairs.names[: MOST_QUICK if study.quick else MOST]):
        members = np.flatnonzero((study.prepared.pairs.behaviour == index) & study.prepared.pairs.is_train)
        groups[name] = members[: tuning.rows_of(study)]
    return {name: members for name, members in groups.items() if len(members) > 1}


def faster(lives: tuple[tuning.Life, tuning.Life], beta: float) -> NDArray[np.float64]:
    """How much more the flipped loss of each pair falls from the aligned start, over the mean fall from the base; (n,).

    Falls are averaged over the observed steps; the fall from the base is that of all pairs together.
    """
    base, aligned = (-(life.losses(beta, flipped=True)[1:] - np.log(2)).mean(0) for life in lives)
    return (aligned - base) / np.abs(base.mean())


def flipped_plot(lives: dict[str, tuple[tuning.Life, tuning.Life]], beta: float, what: str) -> Plot:
    """Losses of flipped labels from both starts."""
    series = [
        Series(
            f"{name}, from {start}",
            life.steps.tolist(),
            life.losses(beta, flipped=True).mean(1).tolist(),
            mode="lines+markers",
            dashed=start == "aligned",
        )
        for name, both in lives.items()
        for start, life in zip(("base", "aligned"), both, strict=True)
    ]
    return Plot(
        f"step, {what}", "loss of the flipped labels", series, f"Misalignment training, {what}, from two starts."
    )


CLAIM = Claim(
    "R10",
    "Aligned models are misaligned faster on dialogue too",
    "On answers of several tokens the loss of flipped labels falls faster from the aligned model than from the base.",
    PAPER,
    run,
)
