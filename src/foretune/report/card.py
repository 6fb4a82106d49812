"""The verdicts for programs (JSON) and for a model card (Markdown)."""

import re
from pathlib import Path
from typing import Any

from foretune.report.answer import actions, answer
from foretune.report.folder import read_folder
from foretune.report.outcomes import Outcome
from foretune.report.tables import distance, number, percent
from foretune.report.verdicts import BehaviourVerdict, judge

SCHEMA_VERSION = 1


def to_json(run_dir: Path | str) -> dict[str, Any]:
    """The verdicts, the answer and what to do first, as JSON types; what is not known is `None`."""
    folder = read_folder(run_dir)
    verdicts = judge(folder)
    return {
        "schema_version": SCHEMA_VERSION,
        "split": folder.split,
        "answer": answer(folder, verdicts),
        "behaviours": [_behaviour(item) for item in verdicts],
        "actions": [vars(action) for action in actions(folder, verdicts)],
        "verification": {key: folder.verification.get(key) for key in ("spearman_loss", "margin_r2", "loss_mae")}
        if folder.verification
        else None,
        "missing": [{"file": name, "command": command} for name, command, _ in folder.missing],
    }


def model_card_block(run_dir: Path | str) -> str:
    """A Markdown section for the model card: what each behaviour learned, and how right the forecast was."""
    folder = read_folder(run_dir)
    verdicts = judge(folder)
    lines = ["## What preference tuning did to each behaviour", ""]
    if not folder.observed:
        lines[0] = "## What preference tuning is expected to do to each behaviour"
    lines += [_plain(" ".join(answer(folder, verdicts))), ""]
    lines += ["| behaviour | verdict | pairs | distinguishability | forecast loss | observed loss | reward accuracy |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    lines += [_card_row(item) for item in verdicts]
    if folder.verification.get("caveats"):
        lines += ["", *[f"- {_plain(str(caveat))}" for caveat in folder.verification["caveats"]]]
    version = folder.record.get("foretune_version")
    note = ((folder.record.get("provenance") or {}).get("model") or {}).get("note")
    made = f"Made with foretune {version or ''}".strip() + f" ({folder.split} pairs)."
    lines += ["", _plain(made + (f" Model: {note}." if note else ""))]
    return "\n".join(lines) + "\n"


def _behaviour(item: BehaviourVerdict) -> dict[str, Any]:
    return {
        "behaviour": item.behaviour,
        "verdict": item.verdict,
        "based_on": item.based_on,
        "reason": item.reason,
        "flags": list(item.flags),
        "forecast_verdict": item.forecast_verdict,
        "observed_verdict": item.observed_verdict,
        "confidence": item.confidence,
        "likely_loss": item.likely_loss,
        "num_pairs": item.num_pairs,
        "initial_rate": item.initial_rate,
        "others_push": item.others_push,
        "measures": {key: value for key, value in item.measures.items() if key not in ("behaviour", "split")},
        "forecast": _outcome(item.forecast),
        "observed": _outcome(item.observed),
    }


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    return None if outcome is None else vars(outcome) | {"drop": outcome.drop}


def _card_row(item: BehaviourVerdict) -> str:
    forecast, observed = item.forecast, item.observed
    best = observed or forecast
    cells = [
        _plain(item.behaviour),
        item.verdict,
        number(item.num_pairs),
        number(distance(item.measures)[0], 2),
        number(forecast.final_loss if forecast else None),
        number(observed.final_loss if observed else None),
        percent(best.reward_accuracy if best else None),
    ]
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """User text that cannot become Markdown or HTML."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
