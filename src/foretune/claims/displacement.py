"""R14: training the output layer on one-token answers never makes the preferred answer less likely."""

import numpy as np

from foretune.claims import last_layer
from foretune.claims.claim import OURS, Check, Claim, Estimate, Evidence, Plot, Series, never_above
from foretune.claims.study import Behaviour, Study

ROWS = 40


def run(study: Study) -> Evidence:
    """Log-probabilities under the whole softmax, along the runs of the output layer."""
    found = [_falls(study, item.first(ROWS)) for item in study.behaviours]
    lowest, share, moved = (np.array(part) for part in zip(*found, strict=True))
    checks = [
        Check(
            "pairs whose margin grew and whose chosen answer became less likely, output layer alone (share)",
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
    return Evidence(checks, [plot], last_layer.SETTINGS | words)


def _falls(study: Study, item: Behaviour) -> tuple[float, float, tuple[float, float]]:
    """(Lowest change of a chosen log-probability where the margin grew, share of falls there, mean margin and change).

    Only the rows of the two answers move, by ±d: p(chosen) becomes p_c eᵈ / (1 + p_c(eᵈ − 1) + p_r(e⁻ᵈ − 1)).
    """
    margins = last_layer.descent(item.phi, last_layer.LONG)[1:] @ item.phi.T
    half = margins / 2
    chosen, rejected = study.answer_probabilities(item)
    change = half - np.log1p(chosen * np.expm1(half) + rejected * np.expm1(-half))
    grown = change[margins > 0]
    return grown.min(), float((grown < 0).mean()), (float(margins[-1].mean()), float(change[-1].mean()))


CLAIM = Claim(
    "R14",
    "No displacement in the output layer",
    "While the output layer alone is trained, no answer whose margin grows becomes less likely; when all weights are "
    "trained it can, where CHES says so.",
    OURS,
    run,
)
