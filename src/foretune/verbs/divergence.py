"""How far a trained model went from its reference, behaviour by behaviour."""

import numpy as np
import torch

from foretune import processes
from foretune.features.unembedding import read_states
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import head_of
from foretune.models.sharded import keep_company
from foretune.scores.divergence import divergence_of_states
from foretune.scores.log_probs import PAIRS_AT_ONCE
from foretune.verbs.audit import store_of
from foretune.verbs.prepare import Prepared
from foretune.verbs.real_run import packed


def divergence(prepared: Prepared, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """KL(π ‖ π_ref) of the next token at the observed pairs' responses, exact over the vocabulary, in nats.

    The tokens are the data's, not sampled: what the policy would say of itself is not asked.

    Args:
        prepared: the job, audited: the reference's states are those of its features.
        model: the trained model, on its device.

    Returns:
        {split: {behaviour: mean over pairs of the mean over both responses' tokens}}.
    """
    members, pairs = prepared.observed, prepared.pairs
    mine = _divergences(prepared, model, processes.mine(members))
    keep_company(model)
    values = np.empty(len(members))
    for number, part in enumerate(processes.together(lambda: mine)):
        values[number :: processes.count()] = part
    found: dict[str, dict[str, float]] = {}
    split_of, behaviour_of = pairs.split_of[members], pairs.behaviour_of[members]
    for split, name in sorted(set(zip(split_of, behaviour_of, strict=True))):
        here = (split_of == split) & (behaviour_of == name)
        found.setdefault(str(split), {})[str(name)] = float(values[here].mean())
    return found


def _divergences(prepared: Prepared, model: torch.nn.Module, members: np.ndarray) -> list[float]:
    """Of each of these pairs, the mean over its scored tokens."""
    pairs, audited = prepared.pairs, prepared.audited.pairs
    reference = read_states(store_of(prepared), audited.num_states)
    first, count = np.full(len(pairs), -1), pairs.num_states
    first[prepared.audited_places] = np.cumsum(audited.num_states) - audited.num_states
    head, reference_head = head_of(model), head_of(prepared.loaded.model)
    forward, found = ForwardPass(model.eval(), packed=packed(prepared)), []
    for start in range(0, len(members), PAIRS_AT_ONCE):
        block = members[start : start + PAIRS_AT_ONCE]
        states = forward.states([pairs[int(index)] for index in block])
        rows = np.concatenate([first[index] + np.arange(count[index]) for index in block])
        other = torch.from_numpy(reference[rows]).to(states.device)
        values = divergence_of_states(head, states, reference_head, other).cpu()
        found += [float(part.mean()) for part in values.split(count[block].tolist())]
    return found
