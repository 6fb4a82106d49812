"""The same statements with a newline after the prompt, which the paper's code has and its text does not show."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foretune.claims.study import Behaviour, Study
from foretune.features.unembedding import first_states
from foretune.models.encoding import encode
from foretune.models.forward_pass import ForwardPass
from foretune.verbs.train import packed


def distances_with_newline(study: Study, behaviours: Sequence[Behaviour], *, rows: int) -> NDArray[np.float64] | None:
    """‖Δ̂‖ of the first `rows` training rows of each behaviour, shape (behaviours,); None where prompts are no text."""
    table = study.prepared.rows("train")
    assert table is not None
    if not isinstance(table[0]["prompt"], str):
        return None
    # a study's training pairs come first, in the order of the rows
    few = [item.first(rows) for item in behaviours]

    def measure() -> dict[str, NDArray[np.float64]]:
        forward = ForwardPass(study.prepared.loaded.model, packed=packed(study.prepared))
        return {"distance": np.array([_distance(study, forward, table, item) for item in few])}

    names = [item.name for item in few]
    return study.stored("newline", {"behaviours": names, "rows": rows}, measure)["distance"]


def _distance(study: Study, forward: ForwardPass, table, item: Behaviour) -> float:
    changed = [row | {"prompt": row["prompt"] + "\n"} for row in table.select(item.members)]
    limit = study.prepared.job.training.max_length
    pairs = list(encode(changed, study.prepared.loaded.tokenizer, split="train", max_length=limit))
    if len(pairs) < len(changed):
        return float("nan")
    states = forward.states(pairs)[first_states(pairs)].double().cpu().numpy()
    return item._replace(states=states).distance
