"""How far a policy's next-token distributions are from its reference's."""

import torch
from torch import Tensor

from foretune.models.head import Head
from foretune.scores.log_probs import states_at_once


@torch.no_grad()
def divergence_of_states(head: Head, states: Tensor, reference_head: Head, reference_states: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of the next token, exact over the vocabulary (nats).

    Args:
        head: the policy's output layer.
        states: its final hidden states, shape (n, hidden).
        reference_head: the reference's output layer.
        reference_states: final hidden states of the reference at the same tokens, shape (n, hidden).

    Returns:
        Shape (n,), float32, never below 0 but for rounding.
    """
    rows = states_at_once(head)
    found = [states.new_zeros(0, dtype=torch.float32)]
    for own, other in zip(states.split(rows), reference_states.split(rows), strict=True):
        policy = torch.log_softmax(head.logits(own).float(), -1)
        reference = torch.log_softmax(reference_head.logits(other).float(), -1)
        found.append((policy.exp() * (policy - reference)).sum(-1))
    return torch.cat(found)
