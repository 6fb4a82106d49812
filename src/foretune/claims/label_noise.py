"""R12: label noise ε multiplies the initial rate by (1 − 2ε)²."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, Check, Claim, Evidence, Plot, Series, near
from foretune.claims.intervals import mean
from foretune.claims.study import MIN_BEHAVIOURS, Behaviour, Study, features
from foretune.objectives import DPO

NOISE = (0.1, 0.2, 0.3, 0.4)
DRAWS = 100


def run(study: Study) -> Evidence:
    """The same share of either answer is flipped, many times; the sampling noise of ‖Δ̂‖² is taken off (T7)."""
    behaviours = study.at_least(MIN_BEHAVIOURS)
    clean = np.array([_rate(item, item.sign) for item in behaviours])
    kept = np.array([[_noisy(item, share) for share in NOISE] for item in behaviours]) / clean[:, None]
    theory = (1 - 2 * np.array(NOISE)) ** 2
    weak = [item.name for item, rate in zip(behaviours, clean, strict=True) if rate <= 0]
    checks = [
        Check(
            f"initial rate with {share:.0%} of the labels flipped, over that without",
            mean(kept[clean > 0, place]),
            near(float(theory[place]), 0.05),
            OURS,
        )
        for place, share in enumerate(NOISE)
    ]
    plot = Plot(
        "(1 − 2ε)²",
        "initial rate over that without noise",
        [
            Series(
                f"ε = {share:g}",
                [float(theory[place])] * len(behaviours),
                kept[:, place].tolist(),
                [item.name for item in behaviours],
            )
            for place, share in enumerate(NOISE)
        ],
        "Each dot is a behaviour, averaged over draws of the flipped labels.",
        diagonal=True,
    )
    notes = [f"Not clearer than noise, left out: {', '.join(weak)}."] if weak else []
    words = {"setting": "initial rate, β = 0.01", "draws of the flipped labels": DRAWS, "behaviours": len(behaviours)}
    return Evidence(checks, [plot], last_layer.SETTINGS | words, notes)


def _noisy(item: Behaviour, share: float) -> float:
    generator, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        sign = item.sign.copy()
        for side in (1, -1):
            members = np.flatnonzero(item.sign == side)
            sign[generator.choice(members, round(share * len(members)), replace=False)] *= -1
        found.append(_rate(item, sign))
    return float(np.mean(found))


def _rate(item: Behaviour, sign: np.ndarray) -> float:
    """The measured initial rate −dL/dt less what sampling noise adds to it, β²/8 times the bias of ‖Δ̂‖² (T7).

    The bias is that of the true classes for any noise: where as many labels of either answer are flipped, drawn without
    replacement, E‖Δ̂_noisy‖² = (1 − 2ε)²‖Δ‖² + tr Σ₊/n₊ + tr Σ₋/n₋.
    """
    objective = DPO(beta=last_layer.PAPER.beta)
    sides = (item.states[item.sign > 0], item.states[item.sign < 0])
    bias = sum(side.var(0, ddof=1).sum() / len(side) for side in sides)
    return last_layer.initial_rate(features(item.states, sign), objective) - objective.beta**2 / 8 * bias


CLAIM = Claim(
    "R12",
    "Label noise slows learning",
    "Where a share ε of the labels is flipped at random, the loss falls at (1 − 2ε)² of the rate at first.",
    OURS,
    run,
)
