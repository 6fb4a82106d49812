"""A sample of the coordinates of large parameters, drawn where gradients are large.

A kernel ⟨φ_i, φ_j⟩, or what any optimiser that acts coordinate by coordinate does to a margin, is a sum over
coordinates. It is estimated without bias from some of them, each weighted by one over the probability with which it was
drawn (Horvitz and Thompson, JASA 1952). Coordinate (r, c) of a matrix is drawn in proportion to u_r v_c, the norms of
row r and column c over the gradients of some pairs, so that rows and columns are drawn one by one and no table of
all coordinates is needed. Parameters share the budget in proportion to Σ u_r v_c, of which an optimiser like Adam,
whose steps are alike in all coordinates, makes a margin's change; a parameter whose part is its size is taken whole.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foretune.models.batches import Targets, states_of, targets_of, token_batches
from foretune.models.encoding import EncodedPair
from foretune.models.evaluating import evaluating
from foretune.models.head import causal_model, head_of
from foretune.scores.log_probs import log_probs_of_states

# Pairs whose gradients tell where to sample, and tokens of a batch of them.
PROBED_PAIRS = 64
PROBED_TOKENS = 512
# Share of the draws that is spread evenly, so that what was small in the probe cannot get a boundless weight.
EVEN_SHARE = 0.1


class Coordinates(NamedTuple):
    """Some coordinates of one parameter.

    Attributes:
        index: which, in row-major order, ascending, shape (c,).
        weight: one over the probability with which each was drawn: how many it stands for, shape (c,), float32.
    """

    index: Tensor
    weight: Tensor


def sample_coordinates(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    names: Collection[str],
    *,
    budget: int,
    packed: bool = True,
    seed: int = 0,
) -> dict[str, Coordinates]:
    """Draw coordinates of parameters; those that are not in the result are taken whole.

    Args:
        model: a causal language model whose parameters `names` require gradients.
        pairs: that features will be taken of; a few are probed.
        names: parameters, as `model.named_parameters()` calls them.
        budget: coordinates of all parameters together, at most (but at least one of each).
        packed: compute each prompt once.
        seed: of the draws.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    if sum(parameter.numel() for parameter in parameters.values()) <= budget:
        return {}
    draw = torch.Generator().manual_seed(seed)
    norms = _norms(model, pairs[:: -(-len(pairs) // PROBED_PAIRS)], parameters, packed=packed, draw=draw)
    for name, parameter in parameters.items():
        if parameter is causal_model(model).get_input_embeddings().weight:
            norms[name] = norms[name].where_met(_tokens_of(pairs, len(parameter)))
    draws = _draws(
        {name: norm.mass for name, norm in norms.items()}, {name: p.numel() for name, p in parameters.items()}, budget
    )
    return {
        name: _drawn(norms[name], max(1, draws[name]), draw, parameter.device)
        for name, parameter in parameters.items()
        if draws[name] < parameter.numel()
    }


def spread(weight: Tensor, draw: torch.Generator) -> Tensor:
    """Random changes ±w √(1 − 1/w) of the weights w: what sums over sampled coordinates vary by if others are drawn.

    Their squares Σ w² (1 − 1/w) x² estimate the variance of Σ w x for independent draws (Horvitz and Thompson); a
    coordinate that was certain to be drawn stays. A large w becomes 0 or 2 w: one half of the sample stands for both.
    """
    sign = 2 * torch.randint(2, weight.shape, generator=draw).to(weight) - 1
    return sign * weight * (1 - 1 / weight).clamp(min=0).sqrt()


def kernel_error(gradient: Tensor, weight: Tensor, *, seed: int = 0) -> float:
    """Relative standard error of the kernel Φ diag(w) Φᵀ, from the difference of two random halves of the sample.

    Args:
        gradient: Φ of some pairs, shape (pairs, coordinates).
        weight: w, shape (coordinates,).
        seed: of the halves.

    Returns:
        The error's Frobenius norm over that of the kernel.
    """
    change = spread(weight, torch.Generator().manual_seed(seed))
    return float((gradient * change @ gradient.T).norm() / (gradient * weight @ gradient.T).norm())


class _Norms(NamedTuple):
    """Norms of the rows and columns of a parameter's gradients (a vector is one column), rows that draws may reach."""

    rows: Tensor
    columns: Tensor
    reached: Tensor

    @property
    def mass(self) -> float:
        """Σ of the coordinates' sizes, if those are the products of row and column norms."""
        total = self.rows.square().sum().sqrt()
        return float(self.rows.sum() * self.columns.sum() / total) if total > 0 else 0.0

    def where_met(self, met: Tensor) -> "_Norms":
        """Of embeddings: rows of tokens that are in the data but were not in the probe count like others there."""
        seen = self.rows[met & (self.rows > 0)]
        unseen = met & (self.rows == 0)
        rows = torch.where(unseen, seen.median() if len(seen) else 1.0, self.rows)
        return self._replace(rows=rows, reached=met.double())

    def chances(self) -> tuple[Tensor, Tensor]:
        """Probabilities of rows and of columns."""
        return _mixed(self.rows, self.reached), _mixed(self.columns, torch.ones_like(self.columns))


def _mixed(norms: Tensor, reached: Tensor) -> Tensor:
    total = norms.sum().clamp(min=torch.finfo(norms.dtype).tiny)
    return (1 - EVEN_SHARE) * norms / total + EVEN_SHARE * reached / reached.sum()


def _norms(
    model: nn.Module,
    probe: Sequence[EncodedPair],
    parameters: Mapping[str, nn.Parameter],
    *,
    packed: bool,
    draw: torch.Generator,
) -> dict[str, _Norms]:
    """Root mean squares over the probe: a batch's sum of gradients with random signs squares to them on average."""
    squares = {name: (torch.zeros(1), torch.zeros(1)) for name in parameters}
    for batch in token_batches(probe, budget=PROBED_TOKENS):
        own = [probe[index] for index in batch]
        with evaluating(model), torch.enable_grad():
            states = states_of(model, own, packed=packed)
            targets = Targets(*(part.to(states.device) for part in targets_of(own)))
            scores = log_probs_of_states(head_of(model, live=True), states, targets, len(own))
            sign = 2 * torch.randint(2, (len(own),), generator=draw).to(states.device) - 1
            total = (sign * (scores.chosen - scores.rejected)).sum()
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                square = gradient.reshape(len(gradient), -1).float().square()
                rows, columns = squares[name]
                squares[name] = rows + square.sum(1).cpu(), columns + square.sum(0).cpu()
    made = {}
    for name, parameter in parameters.items():
        shape = (len(parameter), parameter.numel() // len(parameter))
        norms = [own.expand(size).double().sqrt() for size, own in zip(shape, squares[name], strict=True)]
        made[name] = _Norms(norms[0], norms[1], torch.ones(shape[0]))
    return made


def _draws(mass: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """How often to draw from each parameter, in proportion to `mass`; its size where it is taken whole."""
    whole: set[str] = set()
    while True:
        rest = sum(own for name, own in mass.items() if name not in whole)
        left = budget - sum(sizes[name] for name in whole)
        draws = {name: sizes[name] if name in whole else int(left * own / (rest or 1)) for name, own in mass.items()}
        full = {name for name, count in draws.items() if count >= sizes[name]}
        if full == whole:
            return draws
        whole = full


def _drawn(norms: _Norms, count: int, draw: torch.Generator, device: torch.device) -> Coordinates:
    """The distinct ones of `count` independent draws; each is among them with probability 1 − (1 − p)^count."""
    chances = norms.chances()
    row, column = (torch.multinomial(chance, count, replacement=True, generator=draw) for chance in chances)
    index = torch.unique(row * len(norms.columns) + column)
    chance = chances[0][index // len(norms.columns)] * chances[1][index % len(norms.columns)]
    weight = -1 / torch.expm1(count * torch.log1p(-chance))
    return Coordinates(index.to(device), weight.float().to(device))


def _tokens_of(pairs: Sequence[EncodedPair], vocabulary: int) -> Tensor:
    """Which tokens the pairs contain, shape (vocabulary,)."""
    met = torch.zeros(vocabulary, dtype=torch.bool)
    for pair in pairs:
        met[torch.tensor([*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids])] = True
    return met
