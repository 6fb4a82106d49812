"""How heavy the tails of features are: the index α and the norm K of P(|z| > s) ≤ 2 exp(−(s/K)^α) (theory T5).

Estimated by maximum likelihood in the exponential-power family, density ∝ exp(−|z/a|^α) (Subbotin, 1923): α = 2 is
Gaussian, 1 two-sided exponential, below 1 heavier than that. In it K, the Orlicz norm inf{K: E exp(|z/K|^α) ≤ 2}, is
a(1 − 2^{−α})^{−1/α}, for |z/a|^α has a Gamma(1/α) distribution; Markov's inequality gives the tail bound. Intervals are
those of the profile likelihood (Wilks, 1938). The estimate is as good as the family: a test of fit says where it fails.
"""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import gammainc, gammaln
from scipy.stats import chi2, kstest

from foretune.statistics.hypotheses import Checked
from foretune.statistics.moments import FloatArray, RowSource, blocks_of

# Indices that are told apart: far heavier than any feature's, and as good as bounded.
INDICES = np.geomspace(0.2, 10, 161)
FINE_INDICES = np.geomspace(0.2, 10, 1000)
# Fewer values leave an interval so wide that the index says nothing.
FEWEST = 50


class Tail(NamedTuple):
    """Tails of one distribution around its median, with 95 % intervals.

    Attributes:
        alpha: tail index α.
        alpha_low: lower end of its interval.
        alpha_high: upper end.
        norm: K, in units of the values.
        norm_low: lower end of its interval.
        norm_high: upper end.
    """

    alpha: float
    alpha_low: float
    alpha_high: float
    norm: float
    norm_low: float
    norm_high: float


UNDEFINED = Tail(*[float("nan")] * 6)


def tail_along(rows: RowSource, direction: FloatArray) -> Checked[Tail]:
    """The tails of `rows`, shape (n, dim), along `direction`, shape (dim,), whose length does not matter."""
    along = direction / (np.linalg.norm(direction) or 1.0)
    return tail_index(np.concatenate([block @ along for block in blocks_of(rows)]))


def tail_index(values: FloatArray) -> Checked[Tail]:
    """Estimate α and K from values, shape (n,), a hundred or more.

    Returns:
        The estimates; NaN where values have no spread. Fewer than 50 values and a family that does not fit
        (Kolmogorov–Smirnov, 1 % level) are named.

    >>> found = tail_index(np.random.default_rng(0).laplace(size=2000))
    >>> alpha, alpha_low, alpha_high, norm, norm_low, norm_high = found.value  # in truth 1 and 2
    >>> found.holds, alpha_low < 1 < alpha_high, norm_low < 2 < norm_high
    (True, True, True)
    """
    distances = np.abs(values - np.median(values))
    unit = float(distances.mean())
    if not unit > 0:
        return Checked(UNDEFINED, ("the values have no spread",))
    with np.errstate(divide="ignore"):
        logs = np.log(distances / unit)
    powers = _mean_powers(logs)
    scales = (FINE_INDICES * powers) ** (1 / FINE_INDICES)
    likelihood = len(values) * _mean_log_likelihood(FINE_INDICES, scales, powers)
    best = int(np.argmax(likelihood))
    alpha, scale = float(FINE_INDICES[best]), float(scales[best])
    norm = scale * float(_norm_of_scale(FINE_INDICES[best]))
    norms = norm * np.geomspace(1 / 5, 5, 161)
    some = slice(None, None, 4)  # at its best index a likelihood is flat
    of_scale = norms[:, None] / _norm_of_scale(FINE_INDICES[some])
    of_norms = len(values) * _mean_log_likelihood(FINE_INDICES[some], of_scale, powers[some]).max(1)
    alphas, reach = (_inside(*pair) for pair in ((FINE_INDICES, likelihood), (norms, of_norms)))
    failed = [f"a tail index needs more than {len(values)} values"] * (len(values) < FEWEST)
    fit = kstest((values - np.median(values)) / (unit * scale), lambda z: _distribution(z, alpha), method="asymp")
    if fit.pvalue < 0.01:
        failed.append(f"not exponential-power: the distribution differs from the fitted one by {fit.statistic:.2g}")
    return Checked(Tail(alpha, *alphas, unit * norm, unit * reach[0], unit * reach[1]), tuple(failed))


def _mean_powers(logs: FloatArray) -> FloatArray:
    """Mean of z^α at every fine index, from log z."""
    coarse = np.array([np.exp(index * logs).mean() for index in INDICES])
    return np.exp(CubicSpline(np.log(INDICES), np.log(coarse))(np.log(FINE_INDICES)))


def _mean_log_likelihood(index: FloatArray, scale: FloatArray, powers: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.log(index / (2 * scale)) - gammaln(1 / index) - powers * scale**-index


def _norm_of_scale(alpha: FloatArray) -> FloatArray:
    """K/a."""
    return (1 - 2.0**-alpha) ** (-1 / alpha)


def _distribution(z: FloatArray, alpha: float) -> FloatArray:
    return 0.5 + 0.5 * np.sign(z) * gammainc(1 / alpha, np.abs(z) ** alpha)


def _inside(parameter: FloatArray, likelihood: FloatArray) -> tuple[float, float]:
    """The parameters between which the likelihood is within χ²₁/2 of the best, at 95 %."""
    above = likelihood - likelihood.max() + chi2.ppf(0.95, 1) / 2
    kept = np.flatnonzero(above >= 0)
    ends = []
    for inside, outside in ((kept[0], kept[0] - 1), (kept[-1], kept[-1] + 1)):
        beyond = outside < 0 or outside == len(above)
        share = 0.0 if beyond else above[inside] / (above[inside] - above[outside])
        ends.append(parameter[inside] * (1 - share) + parameter[inside if beyond else outside] * share)
    return float(ends[0]), float(ends[1])
