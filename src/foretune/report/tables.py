"""The tables of the report as plain rows: numbers formatted, nothing about HTML but one small drawing."""

from typing import Any

from foretune.report.folder import Row, RunFolder
from foretune.report.verdicts import BehaviourVerdict

DROPPED = ("empty", "identical", "malformed", "leaked", "duplicates", "surplus", "too_long", "truncated")


def number(value: Any, digits: int = 3) -> str:
    """A number for a table cell: significant digits where small, a dash where there is none."""
    if not isinstance(value, int | float):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.{digits}%}".replace("-", "−")


def distance(measures: Row) -> tuple[float | None, str]:
    """The behaviour's distinguishability, de-biased if known; the generalised one where there are no two classes."""
    value = measures.get("distinguishability")
    if value is not None:
        debiased = measures.get("distinguishability_debiased")
        return value if debiased is None else debiased, "distinguishability"
    return measures.get("generalised_distinguishability"), "generalised distinguishability"


def behaviour_rows(verdicts: list[BehaviourVerdict]) -> list[Row]:
    """One row per behaviour for the big table."""
    largest = max((_furthest(item.measures) for item in verdicts), default=0.0)
    fastest = max((item.initial_rate or 0.0 for item in verdicts), default=0.0)
    return [_behaviour_row(item, largest, fastest) for item in verdicts]


def _furthest(measures: Row) -> float:
    keys = ("distinguishability", "distinguishability_high", "permutation_floor")
    return max([measures.get(key) or 0.0 for key in keys] + [distance(measures)[0] or 0.0])


def _behaviour_row(item: BehaviourVerdict, largest: float, fastest: float) -> Row:
    value, kind = distance(item.measures)
    return {
        "verdict": item,
        "distance": value,
        "kind": kind,
        "whisker": _whisker(item.measures, value, largest),
        "floor": item.measures.get("permutation_floor"),
        "separability": item.measures.get("separability"),
        "priority": item.measures.get("priority"),
        "initial_rate": item.initial_rate / fastest if fastest > 0 and item.initial_rate is not None else None,
        "forecast": item.forecast,
        "observed": item.observed,
    }


def _whisker(measures: Row, value: float | None, largest: float) -> Row | None:
    """Positions in 0..100 of the bar, its end before de-biasing, its interval and the floor; `None` without a value."""
    if value is None or largest <= 0:
        return None
    is_plain = measures.get("distinguishability") is not None
    ends = {"low": "distinguishability_low", "high": "distinguishability_high", "floor": "permutation_floor"}
    drawn: Row = {"value": 100 * max(value, 0.0) / largest}
    drawn["raw"] = 100 * max(measures["distinguishability"], value, 0.0) / largest if is_plain else drawn["value"]
    for name, key in ends.items():
        end = measures.get(key) if is_plain else None
        drawn[name] = None if end is None else 100 * max(end, 0.0) / largest
    return drawn


def interval_text(measures: Row) -> str:
    """The interval in words, for readers and for screen readers."""
    low, high = measures.get("distinguishability_low"), measures.get("distinguishability_high")
    if low is None or high is None or measures.get("distinguishability") is None:
        return ""
    return f"{number(low, 2)} to {number(high, 2)}"


def range_text(ends: tuple[float, float] | None) -> str:
    """The likely loss in words."""
    return "" if ends is None else f"{ends[0]:.2f}–{ends[1]:.2f}"


def data_table(folder: RunFolder) -> tuple[list[str], list[Row]]:
    """The counts of the data: the columns that are not all zero, and the rows."""
    rows = (folder.record.get("data") or {}).get("counts") or []
    columns = [name for name in ("read", "kept") if any(row.get(name) is not None for row in rows)]
    columns += [name for name in DROPPED if any(row.get(name) for row in rows)]
    return columns, rows


def mixture_rows(folder: RunFolder) -> list[Row]:
    """Each behaviour's weight in the mixture now and in the one that starts all behaviours evenly."""
    kernel, equal = folder.audit.get("kernel") or {}, folder.audit.get("equal_rate_mixture") or {}
    weights = dict(zip(kernel.get("behaviours") or [], kernel.get("weights") or [], strict=False))
    total = sum(weight or 0.0 for weight in weights.values())
    if not total:
        return []
    return [
        {"behaviour": name, "now": (weights.get(name) or 0.0) / total, "equal": weight}
        for name, weight in sorted(equal.items(), key=lambda item: -(item[1] or 0.0))
    ]


def verification_rows(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(what, value with its interval, how to read it) for each measure of the verification."""
    said = [
        ("spearman_loss", "order of the final losses", "rank correlation; 1 is the exact order"),
        ("spearman_accuracy", "order of the final accuracies", "rank correlation; 1 is the exact order"),
        ("margin_r2", "pair margins explained", "R²; 1 is every pair exactly"),
        ("margin_slope", "size of the margins", "slope observed on forecast; above 1: more happened than was forecast"),
        ("loss_mae", "mean error of the loss curves", "in units of the loss, over all steps"),
        ("relative_loss_error", "the same, relative", "as a share of the mean change of the losses"),
    ]
    rows = []
    for key, name, how in said:
        value = folder.verification.get(key)
        if value is not None:
            low, high = folder.verification.get(f"{key}_low"), folder.verification.get(f"{key}_high")
            interval = f" ({number(low, 2)} to {number(high, 2)})" if low is not None and high is not None else ""
            rows.append((name, number(value, 3) + interval, how))
    for revision in folder.verification.get("revisions") or []:
        value = f"{number(revision['spearman_loss'], 2)}, error {number(revision['loss_mae'], 3)}"
        rows.append((f"forecast made after step {revision['step']}", value, "order and mean error of the final losses"))
    return rows


def footer_rows(folder: RunFolder) -> list[tuple[str, str]]:
    """Where the run came from: command, model, versions, hashes, times."""
    record, origin = folder.record, folder.record.get("provenance") or {}
    model = origin.get("model") or {}
    rows = [
        ("Command", record.get("command")),
        ("foretune", record.get("foretune_version")),
        ("Model", _model_text(model)),
        ("Model weights", model.get("note")),
        ("Training", _training_text(record)),
        ("Seed", origin.get("seed")),
        ("Device", origin.get("device")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items())),
        ("Model SHA-256", model.get("sha256")),
        ("Tokenizer SHA-256", origin.get("tokenizer_sha256")),
        ("Template SHA-256", origin.get("template_sha256")),
        ("Data SHA-256", origin.get("data_sha256")),
        ("Time", _time_text(record)),
        ("Checks", _probe_text(folder.audit.get("probes") or {})),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _model_text(model: Row) -> str:
    size = model.get("num_parameters")
    parts = [model.get("name"), model.get("architecture"), f"{size:,} parameters" if size else None, model.get("dtype")]
    return ", ".join(str(part) for part in parts if part)


def _training_text(record: Row) -> str:
    plan = record.get("forecast") or {}
    trained = (record.get("train") or {}).get("trainable") or plan.get("trainable")
    rate = plan.get("learning_rate")
    parts = [
        plan.get("objective"),
        f"trains {trained}" if trained else None,
        plan.get("optimizer"),
        f"learning rate {rate:g}" if isinstance(rate, int | float) else None,
        plan.get("scheduler"),
        f"{plan['steps']} steps" if plan.get("steps") else None,
        f"batches of {plan['batch_size']}" if plan.get("batch_size") else None,
        f"forecast of {plan['what_is_forecast']}" if plan.get("what_is_forecast") else None,
    ]
    return "; ".join(str(part) for part in parts if part)


def _time_text(record: Row) -> str:
    stages = record.get("stages") or {}
    said = []
    for name, stage in stages.items():
        seconds = f" {stage['seconds']:.0f} s" if stage.get("seconds") is not None else ""
        finished = f" (finished {stage['finished_at']})" if stage.get("finished_at") else ""
        said.append(f"{name}{seconds}{finished}")
    return ", ".join(said)


def _probe_text(probes: Row) -> str:
    words = {"same_batch_twice": "one batch twice differs by", "batch_split_in_two": "one batch split in two by"}
    return ", ".join(f"{said} {probes[key]:.1e}" for key, said in words.items() if probes.get(key) is not None)
