"""The answer in plain words, and what to do first."""

from collections import Counter
from dataclasses import dataclass

from foretune.report.folder import Row, RunFolder
from foretune.report.verdicts import (
    CROWDED_OUT,
    INDISTINGUISHABLE,
    LEARNED,
    LEARNED_FIRST,
    ONE_CLASS,
    SLOW,
    TOO_FEW,
    UNLEARNED,
    UNLEARNED_AT_FIRST,
    BehaviourVerdict,
)

SEVERITIES = ("high", "medium", "low", "info")
MAX_ACTIONS = 6
MIN_ACTIONS = 3
MAX_NAMES = 3
TROUBLES = {UNLEARNED: "high", CROWDED_OUT: "medium", UNLEARNED_AT_FIRST: "medium"}
TINY_FALL = 0.01


@dataclass(frozen=True)
class Action:
    """One thing to do: what was found, how grave, on what evidence, and the remedy."""

    finding: str
    severity: str
    behaviour: str | None
    num_pairs: int | None
    evidence: str
    remedy: str


def listed(names: list[str], most: int = MAX_NAMES) -> str:
    """Names as a phrase: "a, b and c", "a, b, c and 4 more"."""
    shown, more = names[:most], len(names) - most
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def answer(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> list[str]:
    """The answer to "what will this training do?", one sentence after another."""
    if not verdicts:
        return ["This run folder names no behaviours yet."]
    said = [_opening(folder, verdicts), *_groups(verdicts)]
    fall = _tiny_fall(verdicts)
    if fall is not None:
        said.append(f"Little moves in this run: the largest fall of a loss is {fall:.1%} of its start.")
    said += _agreement(verdicts)
    right = forecast_quality(folder)
    if right:
        said.append(right)
        if folder.verification.get("sentence"):
            said.append(str(folder.verification["sentence"]))
    elif folder.forecast and not folder.observed:
        said.append("Whether the forecast is right is not known yet: this folder holds no training.")
    elif not folder.forecast and not folder.observed:
        said.append("This is read off the data and the untrained model; no curve has been forecast yet.")
    return said


def forecast_quality(folder: RunFolder) -> str | None:
    """One sentence on how right the forecast was; `None` before it has been verified."""
    order = folder.verification.get("spearman_loss")
    mae = folder.verification.get("loss_mae")
    size = f"The forecast loss curves are off by {mae:.3f} on average." if mae is not None else ""
    if order is None:
        return size or None
    low, high = (folder.verification.get(f"spearman_loss_{end}") for end in ("low", "high"))
    interval = f", 95% interval {low:.2f} to {high:.2f}" if low is not None and high is not None else ""
    return f"{quality_word(order)} (rank correlation of the final losses {order:.2f}{interval}). {size}".strip()


def quality_word(order: float) -> str:
    """The forecast's order in words."""
    if order >= 0.8:
        return "The forecast had the order right"
    if order >= 0.5:
        return "The forecast had the order mostly right"
    if order >= 0.2:
        return "The forecast had the order only partly right"
    return "The forecast had the order wrong"


def actions(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> list[Action]:
    """Everything there is to do, the gravest first: the findings, and what the verdicts add to them."""
    found = [_action(row) for row in folder.findings]
    named = {action.behaviour for action in found if any(word in action.finding for word in ("learned", "crowd"))}
    for verdict, severity in TROUBLES.items():
        items = [item for item in verdicts if item.verdict == verdict and item.behaviour not in named]
        found += [_from_verdicts(folder, items, severity)] if items else []
    found = _ranked(_grouped(found))
    for _, command, adds in folder.missing[: max(1, MIN_ACTIONS - len(found))]:
        found.append(Action("next step", "info", None, None, f"Not in this folder yet: {adds}.", f"Run `{command}`."))
    return found


def _opening(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> str:
    pairs = sum(item.num_pairs or 0 for item in verdicts)
    count = f"{len(verdicts)} behaviour{'s' if len(verdicts) != 1 else ''}"
    counts = (folder.record.get("data") or {}).get("counts") or []
    kept = sum(row.get("kept", 0) for row in counts if row["split"] == "train")
    audited = f", {pairs:,} of them audited" if pairs < kept else ""
    data = f"{count} ({max(kept, pairs):,} preference pairs{audited})" if pairs else count
    if folder.observed:
        steps = max(row["step"] for row in folder.observed)
        return f"The model was trained on {data} for {steps} steps."
    if folder.forecast:
        steps = max(row["step"] for row in folder.forecast)
        return f"This is the forecast for {steps} steps of training on {data}."
    return f"This is the audit of {data}."


def _groups(verdicts: list[BehaviourVerdict]) -> list[str]:
    past = any(item.based_on == "observed" for item in verdicts)
    be, have = ("was", "were") if past else ("will be", "will be")
    phrases = {
        LEARNED_FIRST: "{} {be} learned first.",
        LEARNED: "{} {be} learned after that.",
        SLOW: "{} {be} learned late or only in part.",
        CROWDED_OUT: "{} {be} crowded out: the other behaviours push against {them}.",
        UNLEARNED_AT_FIRST: "{} {be} un-learned at first.",
        UNLEARNED: "{} {be} un-learned: the loss {end} above its start.",
    }
    if all(item.verdict != LEARNED_FIRST for item in verdicts):
        phrases[LEARNED] = "{} {be} learned."
    said = []
    for verdict, phrase in phrases.items():
        names = [item.behaviour for item in verdicts if item.verdict == verdict]
        if names:
            verb, them = (have, "them") if len(names) > 1 else (be, "it")
            said.append(phrase.format(listed(names), be=verb, end="ended" if past else "will end", them=them))
    weak = [item.behaviour for item in verdicts if item.verdict in (INDISTINGUISHABLE, ONE_CLASS, TOO_FEW)]
    if weak:
        said.append(f"Nothing firm can be said of {listed(weak)}: the data do not show the preference clearly enough.")
    return said


def _agreement(verdicts: list[BehaviourVerdict]) -> list[str]:
    """How many behaviours got the verdict that was forecast for them, and what became of the un-learning forecast."""
    both = [item for item in verdicts if item.observed_verdict and item.forecast_verdict]
    if not both:
        return []
    same = sum(item.observed_verdict == item.forecast_verdict for item in both)
    said = [f"The forecast gave {same} of {len(both)} behaviours the verdict that training then gave them."]
    missed = [item.behaviour for item in both if (item.observed_verdict, item.forecast_verdict).count(UNLEARNED) == 1]
    surprises = [item.behaviour for item in both if item.observed_verdict == UNLEARNED and item.behaviour in missed]
    if surprises:
        said.append(f"It did not see that {listed(surprises)} would be un-learned.")
    spared = [name for name in missed if name not in surprises]
    if spared:
        said.append(f"It wrongly expected {listed(spared)} to be un-learned.")
    return said


def _tiny_fall(verdicts: list[BehaviourVerdict]) -> float | None:
    found = [item.observed or item.forecast for item in verdicts]
    falls = [outcome.drop / abs(outcome.initial_loss) for outcome in found if outcome and outcome.initial_loss]
    return max(falls) if falls and 0 <= max(falls) < TINY_FALL else None


def _action(row: Row) -> Action:
    severity = row.get("severity")
    return Action(
        finding=str(row.get("finding") or "finding").replace("_", " "),
        severity=severity if severity in SEVERITIES else "info",
        behaviour=row.get("behaviour"),
        num_pairs=None if row.get("num_pairs") is None else int(row["num_pairs"]),
        evidence=str(row.get("evidence") or ""),
        remedy=str(row.get("remedy") or ""),
    )


def _grouped(found: list[Action]) -> list[Action]:
    """Findings of one kind and severity about three behaviours or more become one, the first as the example."""
    kinds: dict[tuple[str, str], list[Action]] = {}
    for item in found:
        kinds.setdefault((item.finding, item.severity), []).append(item)
    grouped = []
    for (finding, severity), items in kinds.items():
        if len(items) < 3 or any(item.behaviour is None for item in items):
            grouped += items
            continue
        first = max(items, key=lambda item: item.num_pairs or 0)
        others = [str(item.behaviour) for item in items if item is not first]
        pairs = sum(item.num_pairs or 0 for item in items)
        evidence = f"{first.evidence} The same holds of {listed(others, 6)}."
        grouped.append(
            Action(
                f"{finding} ({len(items)} behaviours)", severity, None, pairs, evidence, f"For example: {first.remedy}"
            )
        )
    return grouped


def _ranked(found: list[Action]) -> list[Action]:
    """The gravest first; among equals one of each kind before the second of any."""
    found = sorted(found, key=lambda item: (SEVERITIES.index(item.severity), -(item.num_pairs or 0)))
    seen: Counter[str] = Counter()
    keys = []
    for item in found:
        keys.append((SEVERITIES.index(item.severity), seen[item.finding]))
        seen[item.finding] += 1
    return [found[i] for i in sorted(range(len(found)), key=lambda i: keys[i])]


def _from_verdicts(folder: RunFolder, items: list[BehaviourVerdict], severity: str) -> Action:
    """One action for all behaviours with the same verdict, the worst of them as the evidence."""
    worst = items[-1]
    names = listed([item.behaviour for item in items])
    pairs = sum(item.num_pairs or 0 for item in items)
    if len(items) == 1:
        return Action(worst.verdict, severity, worst.behaviour, pairs, worst.reason, _remedy(folder, worst))
    evidence = f"{names}. The worst is {worst.behaviour}: {worst.reason}"
    return Action(f"{worst.verdict} ({len(items)} behaviours)", severity, None, pairs, evidence, _remedy(folder, worst))


def _remedy(folder: RunFolder, item: BehaviourVerdict) -> str:
    weight = (folder.audit.get("equal_rate_mixture") or {}).get(item.behaviour)
    now = _weight_now(folder, item.behaviour)
    if weight is not None and now is not None and weight > now:
        return (
            f"Take the equal-rate mixture, in which all behaviours start evenly: it raises the weight of "
            f"{item.behaviour} from {now:.1%} to {weight:.1%}."
        )
    if weight is not None and weight <= 0:
        return f"No mixture with positive weights teaches {item.behaviour} evenly: train it apart from the others."
    return "Give it more weight in the mixture, or train it apart from the behaviours that push against it."


def _weight_now(folder: RunFolder, name: str) -> float | None:
    kernel = folder.audit.get("kernel") or {}
    weights = dict(zip(kernel.get("behaviours") or [], kernel.get("weights") or [], strict=False))
    total = sum(weight or 0.0 for weight in weights.values())
    return (weights.get(name) or 0.0) / total if total else None
