"""The output layer differentiated in closed form: logits are computed once, a chunk at a time, and never kept.

The gradient of a margin with respect to the logits of a state is G = Σ ±(e_y − p) over the tokens scored there, times
the slope of the head's scaling and soft-capping; with respect to the state it is G W, to the unembedding Σ Gᵀ h.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from foretune.models.batches import Targets
from foretune.models.head import Head
from foretune.scores.log_probs import states_at_once

# (pair of each state (s,), states (s, hidden), G (s, vocabulary)), a chunk at a time
HeadReceiver = Callable[[Tensor, Tensor, Tensor], None]


class HeadGradient(NamedTuple):
    """Margins of n pairs and their gradients as far as the output layer.

    Attributes:
        margin: shape (n,), at least float32.
        states: gradient of the margins' sum with respect to the states, of their shape and dtype.
    """

    margin: Tensor
    states: Tensor


@torch.no_grad()
def differentiate_head(
    head: Head, states: Tensor, targets: Targets, owner: Tensor, receive: HeadReceiver | None = None
) -> HeadGradient:
    """Differentiate margins through the output layer.

    Args:
        head: the output layer.
        states: shape (states, hidden), as of `states_of`.
        targets: as of `targets_of`, on the device of `states`.
        owner: the pair of each state, shape (states,), ascending.
        receive: given what the gradients of the head's own weight and bias are made of.
    """
    exact = torch.promote_types(states.dtype, torch.float32)
    num_pairs = int(owner[-1]) + 1
    sign = targets.sign.to(exact)
    token_logits = head.token_logits(states[targets.state], targets.token).to(exact)
    count = sign.new_zeros(len(states)).index_add(0, targets.state, sign)
    # where both responses start from one state, p cancels, and its logits are not needed
    needed = torch.ones_like(count, dtype=torch.bool) if receive else count != 0
    normaliser = torch.zeros_like(count)
    pulled = _sparse_gradient(head, states, targets, (sign * head.slope(token_logits)) * ~needed[targets.state])
    place = needed.cumsum(0) - 1
    target_place = torch.where(needed[targets.state], place[targets.state], -1)
    step, curved = states_at_once(head), head.scale != 1.0 or head.softcap is not None
    for block, chunk in enumerate(needed.nonzero()[:, 0].split(step)):
        logits = head.logits(states[chunk]).to(exact)
        largest = logits.amax(-1, keepdim=True)
        slope = head.slope(logits) if curved else None
        residual = logits.sub_(largest).exp_()
        total = residual.sum(-1, keepdim=True)
        normaliser[chunk] = (largest + total.log())[:, 0]
        residual *= -count[chunk, None] / total
        row = target_place - block * step
        inside = (row >= 0) & (row < len(chunk))
        residual.index_put_((row[inside], targets.token[inside]), sign[inside], accumulate=True)
        if slope is not None:
            residual *= slope
        pulled[chunk] = torch.nn.functional.linear(residual.to(head.weight.dtype), head.weight.T)
        if receive is not None:
            receive(owner[chunk], states[chunk], residual)
    scores = sign * (token_logits - normaliser[targets.state])
    margin = sign.new_zeros(num_pairs).index_add(0, targets.pair, scores)
    return HeadGradient(margin, pulled)


def _sparse_gradient(head: Head, states: Tensor, targets: Targets, residual: Tensor) -> Tensor:
    """Gradient of the states from residuals at the scored tokens alone, shape (targets,)."""
    used = residual.nonzero()[:, 0]
    gradient = residual.new_zeros(states.shape)
    rows = residual[used, None] * head.weight[targets.token[used]].to(residual.dtype)
    return gradient.index_add(0, targets.state[used], rows).to(states.dtype)
