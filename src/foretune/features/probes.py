"""Preconditions of a long pass, probed on one small batch: is the model deterministic, and blind to its batch?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from foretune.models.batches import supports_packing
from foretune.models.encoding import EncodedPair
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import head_of
from foretune.scores import score_pairs

PROBE_PAIRS = 6
# Largest harmless difference of a response's log-probability, in nats: rounding of either dtype on ordinary answers.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 2.0, torch.float16: 0.5}


class Probes(NamedTuple):
    """Largest differences of a log-probability, in nats.

    Attributes:
        same_batch_twice: between two passes over the same batch.
        batch_split_in_two: between a batch and its rows one by one.
        prompt_once: between computing the prompt once a pair and twice; NaN where the model cannot.
        packed: whether the prompt will be computed once.
        notes: what the user must know, full sentences.
    """

    same_batch_twice: float
    batch_split_in_two: float
    prompt_once: float
    packed: bool
    notes: list[str]


def probe(model: torch.nn.Module, pairs: Sequence[EncodedPair]) -> Probes:
    """Probe a model on the shortest, the longest and some pairs between them."""
    lengths = torch.tensor([len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs])
    by_length = torch.argsort(lengths, stable=True).tolist()
    places = torch.linspace(0, len(pairs) - 1, min(PROBE_PAIRS, len(pairs))).tolist()
    members = [pairs[by_length[round(place)]] for place in places]
    whole = _scores(model, members, packed=False)
    twice = _difference(whole, _scores(model, members, packed=False))
    split = _difference(whole, torch.cat([_scores(model, [pair], packed=False) for pair in members], 1))
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    once, packed = float("nan"), False
    if supports_packing(model):
        once = _difference(whole, _scores(model, members, packed=True))
        packed = once <= max(2 * split, tolerance)
    notes = []
    if twice > 0.1 * tolerance:
        notes.append(f"The same batch twice gives log-probabilities that differ by {twice:.2g}: is dropout active?")
    if split > tolerance:
        notes.append(
            f"Log-probabilities change by {split:.2g} with the composition of the batch: the model sees its padding, "
            "or the dtype is too coarse; try --dtype float32."
        )
    if not packed:
        notes.append("This model cannot compute a prompt once for both answers, so passes take about twice as long.")
    return Probes(twice, split, once, packed, notes)


def _scores(model: torch.nn.Module, pairs: Sequence[EncodedPair], *, packed: bool) -> torch.Tensor:
    # one batch, whatever the pairs' lengths, and every beginning that can be shared
    forward = ForwardPass(model, packed=packed, budget=10**9, overhead=0)
    return torch.stack(score_pairs(head_of(model), forward, pairs))


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())
