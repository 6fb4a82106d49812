"""Preference distinguishability ‖μ₊ − μ₋‖ (Im & Li, 2024, definition 3.1) and what belongs to it."""

from typing import NamedTuple

import numpy as np

from foretune.statistics.moments import Rows, RowSource, variation_of_rows
from foretune.statistics.samples import Sample, Whole


class Distinguishability(NamedTuple):
    """How far apart a behaviour's preferred and rejected examples lie; in units of the hidden states.

    Attributes:
        value: ‖Δ̂‖, the plug-in estimate; biased upwards by sampling noise.
        debiased: √max(0, ‖Δ̂‖² − E[noise]) (theory T7).
        low: lower end of the 95 % bootstrap interval of the true ‖Δ‖ (around `debiased`).
        high: its upper end.
        floor: 95th percentile of ‖Δ̂‖ under permuted labels: a value below it may be noise.
        concentration: max ‖Σ‖_op over both sides.
        trace: max tr Σ over both sides.
        separability: gap over spread along Δ (Cohen's d), cross-fitted: the direction from one half of the rows, the
            gap and spread on the other.
    """

    value: float
    debiased: float
    low: float
    high: float
    floor: float
    concentration: float
    trace: float
    separability: float


UNDEFINED = Distinguishability(*[float("nan")] * 8)


def distinguishability(
    sample: Sample, *, draws: int = 1000, seed: int = 0, whole: Whole | None = None
) -> Distinguishability:
    """Estimate the distinguishability of one behaviour.

    Args:
        sample: the behaviour's rows, or as many of them as are resampled.
        draws: bootstrap draws and permutations.
        seed: of both.
        whole: exact figures of all rows, where `sample` holds but some of them; None: the sample is all there is.

    Returns:
        The estimates; all NaN where a side has fewer than two rows.

    The interval: a bootstrap draw adds the sampling noise once more, so ‖Δ*‖² − 2·bias is centred where the de-biased
    ‖Δ̂‖² − bias is, and its percentiles cover the true ‖Δ‖². With m of n rows it is an m-out-of-n bootstrap: the drawn
    noise is scaled by √(m/n) and added to the whole's Δ̂ (Bickel, Götze & van Zwet, 1997).

    >>> from foretune.statistics.samples import TwoClasses
    >>> rows = np.random.default_rng(0).normal(size=(400, 5)) + np.repeat([[3.0], [0.0]], 200, axis=0)
    >>> found = distinguishability(TwoClasses(rows, np.arange(400) < 200))
    >>> bool(found.low < 3 * 5**0.5 < found.high)
    True
    """
    if not sample.defined:
        return UNDEFINED
    generator = np.random.default_rng(seed)
    rows, whole = sample.rows, whole or sample.whole()
    noise = sample.bootstrap(draws, generator)
    noise -= sample.coefficients()
    noise *= sample.noise_scale(whole)
    squared = float(np.sum(whole.difference**2))
    resampled = np.sum((whole.difference + noise @ rows) ** 2, axis=1) - 2 * whole.bias
    del noise
    permuted = np.sqrt(np.sum((sample.permutations(draws, generator) @ rows) ** 2, axis=1))
    low, high = np.sqrt(np.maximum(np.percentile(resampled, [2.5, 97.5]), 0.0))
    return Distinguishability(
        np.sqrt(squared),
        np.sqrt(max(squared - whole.bias, 0.0)),
        low,
        high,
        float(np.percentile(permuted, 95)) * sample.floor_scale(whole),
        whole.concentration,
        whole.trace,
        separability(sample, generator),
    )


def separability(sample: Sample, generator: np.random.Generator, *, repeats: int = 10) -> float:
    """Cross-fitted Cohen's d along the difference of means, averaged over random halves.

    Fitted and judged on the same rows it would be large for pure noise wherever rows are fewer than dimensions.
    NaN where a half has too few rows for a spread.
    """
    found = []
    for _ in range(repeats):
        halves = sample.halves(generator)
        if not all(half.defined for half in halves):
            return float("nan")
        for fitted, judged in (halves, halves[::-1]):
            found.append(judged.projected_separation(fitted.coefficients() @ fitted.rows))
    return float(np.mean(found))


def generalised_distinguishability(features: RowSource, strata: np.ndarray) -> tuple[float, float]:
    """D = ‖mean φ‖ of one behaviour and its de-biased value (theory T13).

    Args:
        features: φ, shape (n, dim).
        strata: a label a row, shape (n,). The noise of a mean comes from within strata alone where their sizes are
            fixed by design (half Yes, half No), so it is measured there. One label everywhere gives T13's mean of the
            off-diagonal kernel.

    >>> generalised_distinguishability(np.array([[3.0, 4.0], [3.0, 4.0]]), np.zeros(2))
    (5.0, 5.0)
    """
    mean, bias = np.zeros(features.shape[1]), 0.0
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        share = len(members) / len(features)
        own, variation = variation_of_rows(Rows(features, members))
        mean += share * own
        bias += share**2 * variation / len(members)  # NaN where one row is all there is
    squared = float(np.sum(mean**2))
    return float(np.sqrt(squared)), float(np.sqrt(np.maximum(squared - bias, 0.0)))
