"""R14: training the output layer on one-token answers never makes the preferred answer less likely; other runs can.

CHES is of Razin et al. (arXiv 2410.08847): ⟨Σh⁺, Σh⁻⟩ − ‖Σh⁺‖², h the states that predict a response's tokens; the
length-normalised form divides the first by |y⁺||y⁻| and the second by |y⁺|².
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.claims import last_layer, tuning
from foretune.claims.claim import (
    OURS,
    Check,
    Claim,
    Estimate,
    Evidence,
    NotApplicable,
    Plot,
    Series,
    above,
    below,
    never_above,
)
from foretune.claims.dialogue import dialogue_groups
from foretune.claims.intervals import bootstrap, mean, rank_correlation
from foretune.claims.study import Behaviour, Study

ROWS = 40
ROUNDING = 1e-12
OTHERS = "Razin et al."


def run(study: Study) -> Evidence:
    """Log-probabilities under the whole softmax, along the runs of the output layer."""
    found = [_falls(study, item.first(ROWS)) for item in study.behaviours]
    lowest, share, moved = (np.array(part) for part in zip(*found, strict=True))
    checks = [
        Check(
            "output layer alone: pairs whose margin grew and whose chosen answer became less likely (share)",
            Estimate.exact(share.max()),
            never_above(0.0),
            OURS,
        ),
        Check("control: lowest change of such an answer's log-probability (nats)", Estimate.exact(lowest.min())),
    ]
    plot = Plot(
        "mean margin at the end",
        "mean change of the chosen answer's log-probability",
        [Series("behaviour", moved[:, 0].tolist(), moved[:, 1].tolist(), [item.name for item in study.behaviours])],
        "The output layer alone: where margins grow, chosen answers become likelier.",
    )
    words = {"setting": last_layer.LONG.words, "rows of each behaviour": ROWS}
    settings = last_layer.SETTINGS | words
    try:
        more, scatter, tuned = _all_weights(study.of_dialogue())
    except NotApplicable as reason:
        return Evidence(checks, [plot], settings, [f"All weights were not trained: {reason}."])
    return Evidence([*checks, *more], [plot, scatter], settings | tuned)


def _all_weights(study: Study) -> tuple[list[Check], Plot, dict[str, Any]]:
    """All weights trained on the dialogues of all behaviours together: who falls, and whether CHES says who."""
    members = np.sort(np.concatenate([rows[: tuning.rows_of(study) // 2] for rows in dialogue_groups(study).values()]))
    life = tuning.life_of(study, members, tuning.FULL)
    change, margin = (life.log_probs[-1] - life.log_probs[0])[0], life.margins()[-1]
    ches = _ches(study, members)
    order = bootstrap(lambda drawn: rank_correlation(ches[drawn], change[drawn]), len(ches))
    checks = [
        Check("all weights: dialogues whose margin grew while the chosen answer became less likely (share)",
              mean((margin > 0) & (change < 0)), above(0.0), OTHERS),
        Check("all weights: Spearman of CHES (length-normalised) and change of the chosen log-probability, over pairs",
              order, below(0.0), OTHERS),
    ]  # fmt: skip
    plot = Plot(
        "CHES, length-normalised",
        "change of the chosen answer's log-probability",
        [Series("dialogue", ches.tolist(), change.tolist())],
        "All weights trained on dialogues: below 0 the chosen answer became less likely.",
    )
    settings = {f"dialogues: {name}": value for name, value in tuning.settings_of(study, tuning.FULL).items()}
    return checks, plot, settings | {"dialogues": len(members)}


def _ches(study: Study, members: NDArray[np.int64]) -> NDArray[np.float64]:
    first, chosen, rejected = (
        np.asarray(part[members], dtype=float)
        for part in (study.features.first_state, study.features.chosen_mean, study.features.rejected_mean)
    )
    # the mean is over the states behind each token but the last; the first token is predicted from the prompt
    lengths = study.prepared.pairs.lengths[members, 1:, None].astype(float)
    sums = [first + mean * (length - 1) for mean, length in ((chosen, lengths[:, 0]), (rejected, lengths[:, 1]))]
    plus, minus = (total / length for total, length in zip(sums, (lengths[:, 0], lengths[:, 1]), strict=True))
    return (plus * minus).sum(1) - (plus**2).sum(1)


def _falls(study: Study, item: Behaviour) -> tuple[float, float, tuple[float, float]]:
    """(Lowest change of a chosen log-probability where the margin grew, share of falls there, mean margin and change).

    Only the rows of the two answers move, by ±d: p(chosen) becomes p_c eᵈ / (1 + p_c(eᵈ − 1) + p_r(e⁻ᵈ − 1)).
    """
    margins = last_layer.descent(item.phi, last_layer.LONG)[1:] @ item.phi.T
    half = margins / 2
    chosen, rejected = study.answer_probabilities(item)
    change = half - np.log1p(chosen * np.expm1(half) + rejected * np.expm1(-half))
    grown = change[margins > 0]
    return grown.min(), float((grown < -ROUNDING).mean()), (float(margins[-1].mean()), float(change[-1].mean()))


CLAIM = Claim(
    "R14",
    "No displacement in the output layer",
    "While the output layer alone is trained, no answer whose margin grows becomes less likely; when all weights are "
    "trained it can, where CHES says so.",
    OURS,
    run,
)
