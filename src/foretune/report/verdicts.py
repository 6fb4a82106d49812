"""One verdict per behaviour, from the best evidence there is; the page, the terminal and the JSON all read it here.

Evidence, best first: what training did (observed), what it is forecast to do, what the audit measured. With curves, the
yardstick is the largest fall of any behaviour's loss, S (at least 5% of the initial loss):

- *un-learned*: the loss ends above its start by more than 5% of S; *un-learned at first*: it
  rose by that much and came back;
- *learned*: it fell by S/2 or more; *learned first*: so did the earliest quarter of the behaviours;
- *slow*: it fell less; *crowded out*: it fell less and the other behaviours, taken together, push against it.

With the audit alone the same rules read the initial rates. *too few pairs* (fewer than 10) and *one class only* come
before any outcome; *indistinguishable* comes before *slow*, *crowded out* and verdicts from the audit alone.
"""

import math
from dataclasses import dataclass, field

from foretune.report.folder import Row, RunFolder
from foretune.report.outcomes import HALF, NOISE, Outcome, outcomes, scale_of

LEARNED_FIRST = "learned first"
LEARNED = "learned"
SLOW = "slow"
CROWDED_OUT = "crowded out"
UNLEARNED_AT_FIRST = "un-learned at first"
UNLEARNED = "un-learned"
INDISTINGUISHABLE = "indistinguishable (below the permutation floor)"
ONE_CLASS = "one class only"
TOO_FEW = "too few pairs"
UNKNOWN = "not judged yet"

TONES = {
    LEARNED_FIRST: "good",
    LEARNED: "good",
    SLOW: "warn",
    CROWDED_OUT: "bad",
    UNLEARNED_AT_FIRST: "warn",
    UNLEARNED: "bad",
    INDISTINGUISHABLE: "mute",
    ONE_CLASS: "mute",
    TOO_FEW: "mute",
    UNKNOWN: "mute",
}
MIN_PAIRS = 10
FIRST_SHARE = 0.25


@dataclass(frozen=True)
class BehaviourVerdict:
    """The verdict on one behaviour.

    Attributes:
        behaviour: Its name.
        verdict: One of the constants of this module.
        based_on: "observed", "forecast", "audit" or "data".
        reason: One sentence with the numbers behind the verdict.
        flags: Further verdicts that also hold.
        num_pairs: Pairs of the behaviour.
        measures: Its row of `behaviours.parquet`.
        initial_rate: Relative initial speed of learning in the mixture.
        others_push: Part of that speed that comes from the other behaviours; negative when they push against it.
        forecast: What is forecast for it.
        observed: What training did to it.
        forecast_verdict: The verdict that the forecast's curves alone give.
        observed_verdict: The verdict that the observed curves alone give.
        confidence: How far the forecast may be trusted: "high", "medium" or "low"; `None` where it is exact or missing.
        likely_loss: Between which two values the observed loss should lie; `None` without such a forecast.
    """

    behaviour: str
    verdict: str
    based_on: str
    reason: str
    flags: tuple[str, ...] = ()
    num_pairs: int | None = None
    measures: Row = field(default_factory=dict)
    initial_rate: float | None = None
    others_push: float | None = None
    forecast: Outcome | None = None
    observed: Outcome | None = None
    forecast_verdict: str | None = None
    observed_verdict: str | None = None
    confidence: str | None = None
    likely_loss: tuple[float, float] | None = None

    @property
    def tone(self) -> str:
        """How the verdict is coloured: good, warn, bad or mute."""
        return TONES[self.verdict]

    @property
    def rank(self) -> int | None:
        """Rank of the final loss: the observed one where there is one, else the forecast one."""
        outcome = self.observed or self.forecast
        return outcome.rank if outcome else None


def judge(folder: RunFolder) -> list[BehaviourVerdict]:
    """The verdicts on all behaviours, the one learned best first."""
    alone = outcomes(folder, folder.forecast, trained_on="alone")
    forecast = outcomes(folder, folder.forecast) or alone
    observed = outcomes(folder, folder.observed)
    push, rates = others_push(folder.audit), _rates(folder)
    said = folder.record.get("forecast") or {}
    confidence, likely_error = said.get("confidence") or {}, said.get("likely_error")
    evidence = {
        "observed": _from_curves(observed, push, alone),
        "forecast": _from_curves(forecast, push, alone),
        "audit": _from_rates(rates, push),
    }
    verdicts = []
    for name in folder.names:
        verdict, based_on, reason, flags = _combine(*_best_evidence(evidence, name), _data_flags(folder, name))
        verdicts.append(
            BehaviourVerdict(
                behaviour=name,
                verdict=verdict,
                based_on=based_on,
                reason=reason,
                flags=flags,
                num_pairs=_num_pairs(folder, name),
                measures=folder.measures(name),
                initial_rate=rates.get(name),
                others_push=push.get(name),
                forecast=forecast.get(name),
                observed=observed.get(name),
                forecast_verdict=evidence["forecast"].get(name, (None,))[0],
                observed_verdict=evidence["observed"].get(name, (None,))[0],
                confidence=(confidence.get(name) or {}).get("word"),
                likely_loss=_likely_loss(forecast.get(name), likely_error),
            )
        )
    return sorted(verdicts, key=_order)


def _likely_loss(forecast: Outcome | None, error: list[float] | None) -> tuple[float, float] | None:
    if forecast is None or error is None:
        return None
    low, high = (forecast.final_loss + side for side in error)
    return min(max(low, 0.0), forecast.final_loss), high  # few losses fall below 0


def _best_evidence(evidence: dict[str, dict[str, tuple[str, str]]], name: str) -> tuple[str, str, str]:
    """(verdict, what it is based on, reason) from the best evidence there is of a behaviour."""
    for based_on, found in evidence.items():
        if name in found:
            return found[name][0], based_on, found[name][1]
    return UNKNOWN, "data", "Nothing has been measured for it yet."


def others_push(audit: Row) -> dict[str, float]:
    """What the other behaviours add to each one's initial rate: Σ_{j≠k} G_kj π_j of the behaviour kernel G."""
    kernel = audit.get("kernel") or {}
    names, matrix = kernel.get("behaviours") or [], kernel.get("matrix") or []
    weights = kernel.get("weights") or [1.0] * len(names)
    total = sum(weight or 0.0 for weight in weights) or 1.0
    push = {}
    for i, name in enumerate(names):
        terms = [(matrix[i][j], weights[j] or 0.0) for j in range(len(names)) if j != i]
        if terms and all(value is not None for value, _ in terms):
            push[name] = sum(value * weight for value, weight in terms) / total
    return push


def _from_curves(
    found: dict[str, Outcome], push: dict[str, float], alone: dict[str, Outcome]
) -> dict[str, tuple[str, str]]:
    scale = scale_of(found)
    first = _earliest({name: outcome.half_step for name, outcome in found.items()})
    verdicts = {}
    for name, outcome in found.items():
        verdict = _outcome_verdict(outcome, scale, name in first)
        if verdict == SLOW and _is_crowded(outcome, push.get(name), alone.get(name), scale):
            verdict = CROWDED_OUT
        verdicts[name] = (verdict, _outcome_reason(verdict, outcome, alone.get(name)))
    return verdicts


def _outcome_verdict(outcome: Outcome, scale: float, is_first: bool) -> str:
    noise = NOISE * scale
    if outcome.drop < -noise:
        return UNLEARNED
    if outcome.highest_loss > outcome.initial_loss + noise:
        return UNLEARNED_AT_FIRST
    if outcome.drop >= HALF * scale:
        return LEARNED_FIRST if is_first else LEARNED
    return SLOW


def _is_crowded(outcome: Outcome, push: float | None, alone: Outcome | None, scale: float) -> bool:
    """Whether a slow behaviour is slow because of the others: they push against it, or alone it would be learned."""
    if alone is not None and alone.drop <= outcome.drop:
        return False
    if push is not None:
        return push < 0
    return alone is not None and alone.drop >= max(HALF * scale, 2 * outcome.drop)


def _outcome_reason(verdict: str, outcome: Outcome, alone: Outcome | None) -> str:
    said = f"Loss {outcome.initial_loss:.3f} → {outcome.final_loss:.3f} at step {outcome.final_step}"
    if verdict == UNLEARNED_AT_FIRST:
        said += f", after a rise to {outcome.highest_loss:.3f}"
    if verdict in (LEARNED_FIRST, LEARNED) and outcome.half_step is not None:
        said += f"; half of the largest fall at step {outcome.half_step:.0f}"
    if verdict in (CROWDED_OUT, UNLEARNED) and alone is not None:
        said += f"; trained alone, {alone.final_loss:.3f} is forecast"
    return said + "."


def _rates(folder: RunFolder) -> dict[str, float]:
    rates = folder.audit.get("initial_rates") or {}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _from_rates(rates: dict[str, float], push: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Verdicts from the initial rates: the same halves and quarters, of the largest rate."""
    largest = max(rates.values(), default=0.0)
    fast = {name: -rate if largest > 0 and rate >= HALF * largest else None for name, rate in rates.items()}
    first = _earliest(fast)
    verdicts = {}
    for name, rate in rates.items():
        if rate < 0:
            verdict = UNLEARNED_AT_FIRST
        elif fast[name] is not None:
            verdict = LEARNED_FIRST if name in first else LEARNED
        else:
            verdict = CROWDED_OUT if push.get(name, 0.0) < 0 else SLOW
        verdicts[name] = (verdict, _rate_reason(rate, largest))
    return verdicts


def _rate_reason(rate: float, largest: float) -> str:
    if largest <= 0:
        return f"Its initial speed of learning in the mixture is {rate:.3g}."
    share = f"{abs(rate) / largest:.0%}"
    if rate < 0:
        return f"Its loss rises at first, at {share} of the speed with which the fastest behaviour's falls."
    return f"Its initial speed of learning in the mixture is {share} of the fastest behaviour's."


def _earliest(times: dict[str, float | None]) -> set[str]:
    """The earliest quarter (one at least) of several behaviours; nobody is first among one."""
    reached = sorted((time, name) for name, time in times.items() if time is not None)
    if len(times) < 2:
        return set()
    return {name for _, name in reached[: math.ceil(FIRST_SHARE * len(times))]}


def _num_pairs(folder: RunFolder, name: str) -> int | None:
    count = folder.measures(name).get("num_pairs")
    if count is not None:
        return int(count)
    rows = [row for row in folder.observed + folder.forecast if row["behaviour"] == name and row.get("num_pairs")]
    rows = [row for row in rows if row["split"] == folder.split]
    return int(rows[0]["num_pairs"]) if rows else None


def _data_flags(folder: RunFolder, name: str) -> list[tuple[str, str]]:
    """What the data alone say of a behaviour, the weightiest first."""
    measures, count = folder.measures(name), _num_pairs(folder, name)
    value, floor = measures.get("distinguishability"), measures.get("permutation_floor")
    flags = []
    if count is not None and count < MIN_PAIRS:
        flags.append((TOO_FEW, f"Only {count} pair{'s' if count != 1 else ''}: too few to say anything of it."))
    elif measures and value is None and folder.audit.get("answers"):
        flags.append(
            (
                ONE_CLASS,
                "All its pairs (or all but one) prefer the same answer: no two classes to tell apart.",
            )
        )
    if value is not None and floor is not None and value <= floor:
        reached = f"Distinguishability is {value:.3g} before the part of noise is taken off, not above {floor:.3g}"
        flags.append((INDISTINGUISHABLE, f"{reached}, which shuffled preferences reach by chance."))
    return flags


def _combine(
    outcome: str, based_on: str, reason: str, facts: list[tuple[str, str]]
) -> tuple[str, str, str, tuple[str, ...]]:
    """The verdict of a curve and the facts of the data, put in their order of precedence."""
    weak = outcome in (SLOW, CROWDED_OUT, UNKNOWN) or based_on in ("audit", "data")
    for verdict, said in facts:
        if verdict in (TOO_FEW, ONE_CLASS) or weak:
            others = [other for other, _ in facts if other != verdict]
            also = [outcome] if outcome not in (UNKNOWN, SLOW) else []
            more = f" {reason}" if outcome != UNKNOWN else ""
            return verdict, "data", said + more, tuple(others + also)
    return outcome, based_on, reason, tuple(verdict for verdict, _ in facts)


def _order(verdict: BehaviourVerdict) -> tuple[float, float, float, str]:
    rank = verdict.rank if verdict.rank is not None else math.inf
    rate = verdict.initial_rate if verdict.initial_rate is not None else -math.inf
    value = verdict.measures.get("distinguishability") or verdict.measures.get("generalised_distinguishability")
    return rank, -rate, -(value or 0.0), verdict.behaviour
