"""R6: the order of learning persists when features are trained as well."""

import numpy as np

from foretune.claims import tuning
from foretune.claims.claim import PAPER, Check, Claim, Evidence, Plot, Series, above
from foretune.claims.intervals import spearman
from foretune.claims.study import MIN_BEHAVIOURS, Study


def run(study: Study) -> Evidence:
    """Each behaviour alone, LoRA and all weights with AdamW."""
    study.at_least(MIN_BEHAVIOURS)
    items = tuning.tuned(study)
    distance, names = np.array([item.distance for item in items]), [item.name for item in items]
    five = {item.name for item in study.five()}
    checks, plots, settings = [], [], {"behaviours": len(items)}
    for trainable in tuning.trainables(study):
        what = tuning.WORDS[trainable]
        settings |= {f"{what}: {name}": value for name, value in tuning.settings_of(study, trainable).items()}
        beta = settings[f"{what}: β"]
        lives = [tuning.aligned(study, item, trainable).life for item in items]
        losses = np.array([life.losses(beta).mean(1) for life in lives])
        fallen = losses[:, 0] - losses[:, -1]
        checks.append(
            Check(f"{what}: Spearman of ‖Δ‖ and the fall of the loss", spearman(distance, fallen), above(0.0))
        )
        plots.append(
            Plot(
                "distinguishability ‖Δ‖ before training",
                f"fall of the loss, {what}",
                [Series("behaviour", distance.tolist(), fallen.tolist(), names)],
                f"Each dot is a behaviour trained alone, {what}.",
            )
        )
        plots.append(
            Plot(
                f"step, {what}",
                "loss",
                [
                    Series(
                        f"{item.name} (‖Δ‖ {item.distance:.2f})",
                        life.steps.tolist(),
                        loss.tolist(),
                        mode="lines+markers",
                    )
                    for item, life, loss in zip(items, lives, losses, strict=True)
                    if item.name in five
                ],
                f"The loss of five behaviours, each trained alone, {what}.",
            )
        )
    return Evidence(checks, plots, settings)


CLAIM = Claim(
    "R6",
    "The order persists under LoRA and full fine-tuning",
    "With AdamW on LoRA matrices or on all weights, the loss still falls faster for larger ‖Δ‖, less clearly.",
    PAPER,
    run,
)
