"""Log-probabilities of chosen and rejected responses: summed over tokens, or means where pairs say so."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foretune import processes
from foretune.models.batches import Targets, targets_of
from foretune.models.dtype import float32_products_of
from foretune.models.encoding import EncodedPair
from foretune.models.evaluating import evaluating
from foretune.models.forward_pass import ForwardPass
from foretune.models.head import Head, head_of
from foretune.models.sharded import keep_company

# Logits that exist at any one time (16 MB on a CPU: larger blocks would be fetched from the system again and again).
LOGITS_AT_ONCE = {"cpu": 2**22}
LOGITS_AT_ONCE_OF_OTHERS = 2**28
# Pairs whose hidden states exist at any one time.
PAIRS_AT_ONCE = 256


class PairScores(NamedTuple):
    """log π(response | prompt) of n pairs, summed or averaged over response tokens (nats); each of shape (n,)."""

    chosen: Tensor
    rejected: Tensor


def log_probs_of_states(head: Head, states: Tensor, targets: Targets, num_pairs: int) -> PairScores:
    """Score pairs from their hidden states.

    Args:
        head: the output layer.
        states: shape (states, hidden), as of `states_of`.
        targets: as of `targets_of`, on the device of `states`.
        num_pairs: how many pairs the targets belong to.

    Returns:
        float32 scores; differentiable in the head's weights and in `states`.
    """
    with float32_products_of(head.numbers):
        chunks = states.split(states_at_once(head))
        normaliser = torch.cat([torch.logsumexp(head.logits(chunk), -1) for chunk in chunks])
    scored = head.token_logits(states[targets.state], targets.token) - normaliser[targets.state]
    return sum_by_response(scored, targets, num_pairs)


def states_at_once(head: Head) -> int:
    """How many hidden states are turned into logits at a time."""
    return max(1, LOGITS_AT_ONCE.get(head.weight.device.type, LOGITS_AT_ONCE_OF_OTHERS) // len(head.weight))


def sum_by_response(scored: Tensor, targets: Targets, num_pairs: int) -> PairScores:
    """Add token log-probabilities up per response, each as much as it counts."""
    is_chosen = targets.sign > 0
    counted = scored * targets.sign.abs().to(scored)
    sums = [
        scored.new_zeros(num_pairs).index_add(0, targets.pair[side], counted[side]) for side in (is_chosen, ~is_chosen)
    ]
    return PairScores(*sums)


@torch.no_grad()
def pair_scores(
    model: torch.nn.Module, pairs: Sequence[EncodedPair], *, packed: bool = True, budget: int | None = None
) -> PairScores:
    """Score any number of pairs with a model, on its device.

    Args:
        model: a causal language model.
        pairs: in any order.
        packed: compute prompts, and beginnings that prompts share, once.
        budget: tokens of a batch; None: what suits the device.

    Returns:
        float64 scores on the CPU, in the order of `pairs`.
    """
    head, forward = head_of(model), ForwardPass(model, packed=packed, budget=budget)
    return score_pairs(head, forward, pairs)


def divided_scores(model: torch.nn.Module, pairs: Sequence[EncodedPair], *, packed: bool = True) -> np.ndarray:
    """Scores of chosen and rejected, shape (2, n), on every process; each has computed its share of the pairs.

    The model is in evaluation mode meanwhile.
    """
    with evaluating(model):
        scores = pair_scores(model, processes.mine(pairs), packed=packed)
    keep_company(model)
    parts = processes.together(lambda: np.stack([scores.chosen.numpy(), scores.rejected.numpy()]))
    found = np.empty((2, len(pairs)))
    for number, part in enumerate(parts):
        found[:, number :: len(parts)] = part
    return found


@torch.no_grad()
def score_pairs(head: Head, forward: ForwardPass, pairs: Sequence[EncodedPair]) -> PairScores:
    """The same with a pass that is already open."""
    parts: list[Sequence[Tensor]] = [[*torch.zeros(2, 0, dtype=torch.float64)]]  # no pairs, no scores
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        block = pairs[start : start + PAIRS_AT_ONCE]
        targets = Targets(*(part.to(head.weight.device) for part in targets_of(block)))
        scores = log_probs_of_states(head, forward.states(block), targets, len(block))
        parts.append([side.double().cpu() for side in scores])
    return PairScores(*(torch.cat(side) for side in zip(*parts, strict=True)))
