"""Log-probabilities of chosen and rejected responses (summed over tokens, as DPO defines its margin)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foretune.models.batches import Targets, states_of, targets_of, token_batches
from foretune.models.encoding import EncodedPair
from foretune.models.head import Head, head_of

# Rows of logits that exist at any one time: 256 × 50,000 × 4 bytes = 50 MB.
STATES_AT_ONCE = 256


class PairScores(NamedTuple):
    """log π(response | prompt) of n pairs, summed over response tokens (nats); each of shape (n,)."""

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
    normaliser = torch.cat([torch.logsumexp(head.logits(chunk), -1) for chunk in states.split(STATES_AT_ONCE)])
    scored = head.token_logits(states[targets.state], targets.token) - normaliser[targets.state]
    return sum_by_response(scored, targets, num_pairs)


def sum_by_response(scored: Tensor, targets: Targets, num_pairs: int) -> PairScores:
    """Add token log-probabilities up per response."""
    is_chosen = targets.sign > 0
    sums = [
        scored.new_zeros(num_pairs).index_add(0, targets.pair[side], scored[side]) for side in (is_chosen, ~is_chosen)
    ]
    return PairScores(*sums)


@torch.no_grad()
def pair_scores(
    model: torch.nn.Module, pairs: Sequence[EncodedPair], *, packed: bool = True, budget: int = 2048
) -> PairScores:
    """Score any number of pairs with a model, on its device, in batches of at most `budget` tokens.

    Returns:
        float64 scores on the CPU, in the order of `pairs`.
    """
    head = head_of(model)
    device = head.weight.device
    chosen, rejected = torch.zeros(2, len(pairs), dtype=torch.float64)
    for batch in token_batches(pairs, budget=budget):
        members = [pairs[index] for index in batch]
        targets = Targets(*(part.to(device) for part in targets_of(members)))
        scores = log_probs_of_states(head, states_of(model, members, packed=packed), targets, len(members))
        chosen[batch] = scores.chosen.double().cpu()
        rejected[batch] = scores.rejected.double().cpu()
    return PairScores(chosen, rejected)
