"""Margins of a run that trains the unembedding W alone, exact: hidden states never change, so they are stored.

The states of a large data set stay on the disk: a batch's states are read when it is computed.

Most rows of W hardly matter: a token of probability ~0 neither moves margins nor is moved by SGD. With `mass` < 1 only
the rows that carry that share of the probability are trained, the others are held as a constant in the normaliser (our
own approximation, for many runs at little cost); `mass=1` trains all rows, and the run is then exact to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.features.coordinates import Coordinates
from foretune.models.batches import Targets, num_states, targets_of
from foretune.models.encoding import EncodedPair
from foretune.models.head import Head
from foretune.scores.convention import Convention
from foretune.scores.log_probs import sum_by_response
from foretune.statistics.moments import RowSource

STATES_AT_ONCE = 256
PAIRS_AT_ONCE = 128
# States of at most so many numbers are kept in memory, 256 MB.
LARGEST_STATES = 2**26
# The trained weights under the name they have in the real model, so that weight decay treats them alike.
WEIGHT = "lm_head.weight"
SUMS = Convention()


class HeadProblem(NamedTuple):
    """Everything a run of the unembedding depends on.

    Attributes:
        head: the reference's output layer, restricted to the trained rows.
        states: scored hidden states, shape (states, hidden), float32 in memory or on the disk.
        pairs: what is scored on them.
        first_state: where each pair's states begin, and where the last one's end, shape (pairs + 1,).
        row_of: the trained row of each token, −1 where it has none, shape (vocabulary,); None: all rows are trained.
        rest: log Σ exp(logit) over the rows that are not trained, shape (states,); None where all are trained.
        reference: scores of chosen and rejected under the reference, 0 where the loss knows none, shape (2, pairs).
    """

    head: Head
    states: RowSource | Tensor
    pairs: Sequence[EncodedPair]
    first_state: NDArray[np.int64]
    row_of: Tensor | None
    rest: Tensor | None
    reference: Tensor

    @property
    def sampled(self) -> Mapping[str, Coordinates]:
        """Rows that are left out are taken to stay."""
        return {}

    @property
    def decayed(self) -> None:
        """Names tell."""

    def start(self) -> dict[str, Tensor]:
        """The trained rows of W, shape (rows, hidden)."""
        return {WEIGHT: self.head.weight}

    def margins(self, parameters: Mapping[str, Tensor], pairs: Tensor, *, training: bool = False) -> Tensor:
        """Margins of some pairs under other weights, shape (len(pairs),); there is no dropout in the output layer.

        Of n pairs, n + i is the chosen score of pair i.
        """
        own, place = (pairs % len(self.pairs)).unique(return_inverse=True)
        chosen, rejected = (self.log_probs(parameters[WEIGHT], own) - self.reference[:, own])[:, place]
        return chosen - torch.where((pairs < len(self.pairs)).to(rejected.device), rejected, 0.0)

    def log_probs(self, weight: Tensor, pairs: Tensor) -> Tensor:
        """Summed or mean log-probabilities of chosen and rejected of some pairs under W, shape (2, len(pairs))."""
        where, states, targets = self.block(pairs.tolist())
        logits = self.head._replace(weight=weight).logits(states)
        normaliser = torch.logsumexp(logits, -1)
        if self.rest is not None:
            normaliser = torch.logaddexp(normaliser, self.rest[where])
        scored = logits[targets.state, targets.token] - normaliser[targets.state]
        return torch.stack(sum_by_response(scored, targets, len(pairs)))

    def block(self, members: Sequence[int]) -> "StateBlock":
        """States and targets of some pairs, on the device of the head."""
        device = self.head.weight.device
        where = np.concatenate([np.arange(*self.first_state[member : member + 2]) for member in members])
        states = self.states[where]
        states = states if isinstance(states, Tensor) else torch.from_numpy(states).float().to(device)
        targets = Targets(*(part.to(device) for part in targets_of([self.pairs[member] for member in members])))
        if self.row_of is not None:
            targets = targets._replace(token=self.row_of[targets.token])
        return StateBlock(torch.from_numpy(where).to(device), states, targets)


class StateBlock(NamedTuple):
    """The scored hidden states of some pairs.

    Attributes:
        where: index of each among all states, shape (states,).
        states: shape (states, hidden), float32.
        targets: what is scored on them, numbered within the block.
    """

    where: Tensor
    states: Tensor
    targets: Targets


@torch.no_grad()
def head_problem(
    head: Head,
    states: RowSource | Tensor,
    pairs: Sequence[EncodedPair],
    *,
    mass: float = 1.0,
    convention: Convention = SUMS,
    sided: bool = False,
) -> HeadProblem:
    """Prepare the problem, choosing the rows of W to train.

    Args:
        head: the reference's output layer, float32.
        states: scored hidden states, shape (states, hidden), pair by pair; those on the disk are left there if they are
            more than LARGEST_STATES numbers.
        pairs: all pairs, trained on or not.
        mass: probability that the trained rows carry together, averaged over the states.
        convention: what the margin is made of.
        sided: scores are wanted besides margins, so that what cancels in a margin matters too.
    """
    first = np.concatenate([[0], np.cumsum([num_states(pair) for pair in pairs])])
    if isinstance(states, Tensor) or np.prod(states.shape) <= LARGEST_STATES:
        states = torch.as_tensor(states[: int(first[-1])]).float().to(head.weight.device)
    problem = HeadProblem(head, states, convention.scored(pairs), first, None, None, torch.empty(0))
    if mass < 1:
        problem = _with_fewer_rows(problem, mass, sided)
    parts = torch.arange(len(pairs)).split(PAIRS_AT_ONCE)
    reference = torch.cat([problem.log_probs(problem.head.weight, part) for part in parts], 1)
    return problem._replace(reference=reference if convention.reference else torch.zeros_like(reference))


def _with_fewer_rows(problem: HeadProblem, mass: float, sided: bool) -> HeadProblem:
    head, device = problem.head, problem.head.weight.device
    probability = _moving_probability(problem, sided)
    order = torch.argsort(probability, descending=True)
    carried = torch.cumsum(probability[order].double(), 0)
    enough = int(torch.searchsorted(carried, mass * carried[-1])) + 1
    scored = torch.zeros(len(probability), dtype=torch.bool, device=device)
    for block in _blocks(problem):
        scored[block.targets.token] = True
    active = torch.unique(torch.cat([order[:enough], torch.nonzero(scored)[:, 0]]))
    others = torch.ones(len(probability), dtype=torch.bool, device=device).index_fill(0, active, False)
    rest = [
        torch.logsumexp(head.logits(chunk)[:, others], -1)
        for block in _blocks(problem)
        for chunk in block.states.split(STATES_AT_ONCE)
    ]
    row_of = torch.full((len(probability),), -1, device=device)
    row_of[active] = torch.arange(len(active), device=device)
    return problem._replace(
        head=head._replace(weight=head.weight[active], bias=None if head.bias is None else head.bias[active]),
        row_of=row_of,
        rest=torch.cat(rest),
    )


def _moving_probability(problem: HeadProblem, sided: bool) -> Tensor:
    """Σ of the softmax over the states where it matters; shape (vocabulary,).

    Where chosen and rejected start from the same state, it cancels in the margin, though not in their own scores.
    """
    probability = torch.zeros(len(problem.head.weight), device=problem.head.weight.device)
    for block in _blocks(problem):
        sign = block.targets.sign.abs() if sided else block.targets.sign
        count = block.states.new_zeros(len(block.states)).index_add(0, block.targets.state, sign)
        for chunk in block.states[count != 0].split(STATES_AT_ONCE):
            probability += torch.softmax(problem.head.logits(chunk), -1).sum(0)
    if not probability.any():
        probability += torch.softmax(problem.head.logits(problem.block([0]).states[:1]), -1)[0]
    return probability


def _blocks(problem: HeadProblem) -> Iterator[StateBlock]:
    """All states in order, those of some pairs at a time."""
    for start in range(0, len(problem.pairs), PAIRS_AT_ONCE):
        yield problem.block(range(start, min(start + PAIRS_AT_ONCE, len(problem.pairs))))
