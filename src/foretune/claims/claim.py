"""What a claim is and what testing it gives: numbers with intervals, a verdict that follows from them, and plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, nextafter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from foretune.claims.study import Study

SHOWN, NOT_SHOWN, OPPOSITE, NOT_APPLICABLE = "shown", "not shown", "opposite", "not applicable"
PAPER, OURS, FOLLOW_UP = "paper", "ours", "follow-up"


class NotApplicable(Exception):
    """This model or data set cannot show the claim; the message says why, in one sentence."""


class Estimate(NamedTuple):
    """A number and its interval; exact numbers have an interval of no width."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Estimate":
        """A number that is computed, not estimated: the largest of all cases, say."""
        return cls(float(value), float(value), float(value))


@dataclass(frozen=True)
class Criterion:
    """What an interval must be; fixed in code before any run.

    Attributes:
        least: shown if the whole interval is above this …
        most: … and below this.
        contrary_below: opposite if the whole interval is below this.
        contrary_above: opposite if the whole interval is above this.
        words: the same for readers.
    """

    least: float
    most: float
    contrary_below: float
    contrary_above: float
    words: str

    def verdict(self, found: Estimate) -> str:
        """Shown, opposite, or not shown where the interval decides neither (or is undefined)."""
        if not all(map(isfinite, found)):
            return NOT_SHOWN
        if self.least < found.low and found.high < self.most:
            return SHOWN
        return OPPOSITE if found.high < self.contrary_below or found.low > self.contrary_above else NOT_SHOWN


def above(threshold: float, *, nothing: float = 0.0) -> Criterion:
    """An effect of at least `threshold`, where `nothing` would be no effect.

    >>> above(0.9).verdict(Estimate(0.95, 0.92, 0.99)), above(0.9).verdict(Estimate(-0.5, -0.7, -0.2))
    ('shown', 'opposite')
    """
    return Criterion(threshold, inf, nothing, inf, f"> {threshold:g}")


def below(threshold: float, *, nothing: float = 0.0) -> Criterion:
    """An effect of at most `threshold`, where `nothing` would be no effect."""
    return Criterion(-inf, threshold, -inf, nothing, f"< {threshold:g}")


def near(target: float, tolerance: float) -> Criterion:
    """Equal to `target` within `tolerance`; opposite if the whole interval is farther away.

    >>> near(2, 0.1).verdict(Estimate(2.0, 1.8, 2.2))
    'not shown'
    """
    low, high = target - tolerance, target + tolerance
    return Criterion(low, high, low, high, f"{target:g} ± {tolerance:g}")


def never_above(limit: float) -> Criterion:
    """The largest of all cases is at most `limit`; one case above it is the opposite."""
    return Criterion(-inf, nextafter(limit, inf), -inf, limit, f"≤ {limit:g} in every case")


@dataclass(frozen=True)
class Check:
    """One number that a claim stands or falls with, or (`control`) that is shown beside it.

    Attributes:
        what: what was measured.
        found: its value and interval.
        wanted: what it must be; None: a control, which has no part in the verdict.
        source: whose statement it is.
    """

    what: str
    found: Estimate
    wanted: Criterion | None = None
    source: str = PAPER

    @property
    def verdict(self) -> str | None:
        """Of this number alone; None for a control."""
        return None if self.wanted is None else self.wanted.verdict(self.found)


class Series(NamedTuple):
    """One line or cloud of a plot.

    Attributes:
        name: in the legend; what stands before its last comma decides its colour.
        x: shape (n,).
        y: shape (n,).
        text: a label for each point, or None.
        mode: "lines", "markers" or "lines+markers".
        dashed: draw its line dashed, beside another of the same colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    text: Sequence[str] | None = None
    mode: str = "markers"
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure as data; the report draws it.

    Attributes:
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        series: what is drawn.
        caption: one sentence that says what is seen.
        log: both axes logarithmic.
        diagonal: draw the line y = x, where prediction and outcome agree.
    """

    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str
    log: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Evidence:
    """What testing a claim found.

    Attributes:
        checks: the numbers, the weightiest first.
        plots: in the paper's form where it has one.
        settings: of the runs behind them, name to value.
        notes: what a reader must know, full sentences.
    """

    checks: Sequence[Check]
    plots: Sequence[Plot] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """That of the weakest number: one that says the opposite decides, then one that shows nothing."""
        found = [check.verdict for check in self.checks if check.wanted is not None]
        return next((verdict for verdict in (OPPOSITE, NOT_SHOWN) if verdict in found), SHOWN)


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: R1 … R14.
        title: a few words.
        statement: one sentence, with direction.
        source: whose statement it is.
        run: tests it on a study; raises NotApplicable where that cannot be done.
    """

    name: str
    title: str
    statement: str
    source: str
    run: Callable[["Study"], Evidence]


def result_of(claim: Claim, evidence: Evidence, *, seconds: float) -> dict[str, Any]:
    """The claim's page as plain values."""
    return {
        **_heading(claim),
        "verdict": evidence.verdict,
        "reason": None,
        "checks": [
            {
                "what": check.what,
                **check.found._asdict(),
                "wanted": None if check.wanted is None else check.wanted.words,
                "verdict": check.verdict,
                "source": check.source,
            }
            for check in evidence.checks
        ],
        "plots": [asdict(plot) | {"series": [series._asdict() for series in plot.series]} for plot in evidence.plots],
        "settings": dict(evidence.settings),
        "notes": list(evidence.notes),
        "seconds": seconds,
    }


def not_applicable(claim: Claim, reason: str) -> dict[str, Any]:
    """The page of a claim that this model or data set cannot show."""
    empty = {"checks": [], "plots": [], "settings": {}, "notes": [], "seconds": 0.0}
    return {**_heading(claim), "verdict": NOT_APPLICABLE, "reason": reason, **empty}


def _heading(claim: Claim) -> dict[str, str]:
    return {"claim": claim.name, "title": claim.title, "statement": claim.statement, "source": claim.source}
