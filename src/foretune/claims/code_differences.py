"""Controls: where the paper's code measures other states than its text says, does it change who is distinguishable?

The code normalises the final states once more, although the library has already; and it adds a newline to the
prompt in some scripts (fine-tuning, the embedding notebook) and not in others (output layer, priority).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.claims.claim import Check
from foretune.claims.intervals import mean, spearman
from foretune.claims.study import Behaviour, Study
from foretune.features.unembedding import first_states
from foretune.models.encoding import encode
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import trunk
from foretune.verbs.real_run import packed

FEW, ROWS = 8, 50


def code_differences(study: Study) -> list[Check]:
    """Rank correlation and mean ratio of ‖Δ‖ with and without; those that can be measured on this model and data."""
    few = [item.first(ROWS) for item in study.spread(FEW)]
    found = {
        "normalised twice": (study.behaviours, _normalised_twice(study)),
        "newline": (few, _with_newline(study, few)),
    }
    checks = []
    for what, (items, changed) in found.items():
        if changed is not None:
            plain = np.array([item.distance for item in items])
            checks.append(Check(f"control, {what}: Spearman of ‖Δ‖ with and without", spearman(plain, changed)))
            checks.append(Check(f"control, {what}: ‖Δ‖ with over without", mean(changed / plain)))
    return checks


def _normalised_twice(study: Study) -> NDArray[np.float64] | None:
    """‖Δ̂‖ of every behaviour after another root mean square norm; None where the model's final norm is none."""
    norm = getattr(trunk(study.prepared.loaded.model), "norm", None)
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None:
        return None
    scale = weight.detach().double().cpu().numpy()

    def again(states: NDArray[np.float64]) -> NDArray[np.float64]:
        return states / np.sqrt((states**2).mean(1, keepdims=True) + 1e-5) * scale

    return np.array([item._replace(states=again(item.states)).distance for item in study.behaviours])


def _with_newline(study: Study, few: list[Behaviour]) -> NDArray[np.float64] | None:
    """‖Δ̂‖ of each of a few behaviours with a newline after the prompt; None where prompts are no text."""
    table = study.prepared.rows("train")
    assert table is not None
    if not isinstance(table[0]["prompt"], str):
        return None

    def measure() -> dict[str, NDArray[np.float64]]:
        forward = ForwardPass(study.prepared.loaded.model, packed=packed(study.prepared))
        return {"distance": np.array([_distance(study, forward, table, item) for item in few])}

    settings = {"behaviours": [item.name for item in few], "rows": ROWS}
    return study.stored("newline", settings, measure)["distance"]


def _distance(study: Study, forward: ForwardPass, table: Any, item: Behaviour) -> float:
    # training pairs come first among all pairs, in the order of the rows
    changed = [row | {"prompt": row["prompt"] + "\n"} for row in table.select(item.members)]
    limit = study.prepared.job.training.max_length
    pairs = list(encode(changed, study.prepared.loaded.tokenizer, split="train", max_length=limit))
    if len(pairs) < len(changed):
        return float("nan")
    states = forward.states(pairs)[first_states(pairs)].double().cpu().numpy()
    return item._replace(states=states).distance
