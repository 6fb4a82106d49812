"""Pair gradients of whole weight matrices, each a few outer products; of vectors (norms, biases) as they are.

What `token_factors` keeps of adapted layers, kept of any trainable matrix: linear layers, embeddings, the output
layer. So a run of all weights can be simulated with every coordinate there.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretune.features.blocks import block_bounds, measure_blocks
from foretune.features.caught import PairTokens
from foretune.features.gradient_pass import GradientPass
from foretune.features.layer_gradients import LayerGradients, complete, lookup_scale
from foretune.features.pair_gradients import PAIRS_PER_SHARD, differentiate_margins
from foretune.features.store import ShardColumn, ShardStore
from foretune.features.token_factors import low_rank
from foretune.models.encoding import EncodedPair
from foretune.models.head import head_of


class Factors(NamedTuple):
    """G ≈ Σ_k left_k right_kᵀ of one matrix, for each of n pairs.

    Attributes:
        left: shape (n, k, rows).
        right: shape (n, k, columns).
    """

    left: Tensor
    right: Tensor


class WeightFactors(NamedTuple):
    """Margins of n pairs and their gradients.

    Attributes:
        margin: log π(chosen) − log π(rejected) in nats, shape (n,).
        matrices: by parameter name; k is the rank times the number of layers that share the parameter.
        vectors: of the other parameters, in the order of their names, shape (n, Σ coordinates).
    """

    margin: Tensor
    matrices: dict[str, Factors]
    vectors: Tensor


def batch_weight_factors(
    model: nn.Module, pairs: Sequence[EncodedPair], names: Collection[str], *, rank: int, packed: bool = True
) -> WeightFactors:
    """Factors of one batch, in one forward and one backward pass, with the model in evaluation mode: no dropout.

    Args:
        model: a causal language model; it is left as it was.
        pairs: the batch.
        names: parameters, as `model.named_parameters()` calls them.
        rank: outer products kept for each pair and layer; exact where a pair has no more tokens.
        packed: compute each prompt once (see `foretune.models.batches`).

    Returns:
        Everything in float32 (float64 for a float64 model), on the model's device.

    Raises:
        UserError: a parameter whose gradient cannot be told apart by pair.
    """
    layers = _LayerFactors(model, names, PairTokens(pairs), rank)
    with layers.watching():
        own = differentiate_margins(model, pairs, packed=packed, receive=layers.receiver_of(head_of(model, live=True)))
    vectors = torch.cat([own.margin.new_zeros(len(pairs), 0), *layers.finished().values()], 1)
    return WeightFactors(own.margin, layers.matrices(), vectors)


class _LayerFactors(LayerGradients):
    """Gradients of vectors; of matrices the factors of every layer that shares one, side by side."""

    def __init__(self, model: nn.Module, names: Collection[str], tokens: PairTokens, rank: int) -> None:
        exact = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        super().__init__(model, names, tokens, sampled={}, dtype=exact)
        self._rank = rank
        self._matrices = [name for name in names if model.get_parameter(name).ndim > 1]
        self.names = [name for name in names if name not in self._matrices]
        self._factors: dict[str, Factors] = {}
        # of the output layer: name of its weight, then states and logit gradients of each pair
        self._head: str | None = None
        self._scored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tokens.lengths]
        self._of_scored: dict[int, Factors] = {}

    def matrices(self) -> dict[str, Factors]:
        if self._head is not None:
            self._compress_scored(len(self._scored))
            own = [self._of_scored[pair] for pair in range(len(self._scored))]
            self._add(self._head, Factors(*(torch.cat(side) for side in zip(*own, strict=True))))
        return complete(self._factors, self._matrices)

    def _receive_head(self, name: str, residual: Tensor, states: Tensor, owner: Tensor) -> None:
        self._head = name
        for pair in owner.unique().tolist():
            self._scored[pair].append((states[owner == pair].to(self._dtype), residual[owner == pair].to(self._dtype)))
        self._compress_scored(int(owner[-1]))

    def _compress_scored(self, before: int) -> None:
        """Logit gradients are as long as the vocabulary: those of pairs that are complete are not kept."""
        for pair in range(before):
            if pair not in self._of_scored:
                states, residual = (torch.cat(parts)[None] for parts in zip(*self._scored[pair], strict=True))
                self._of_scored[pair] = self._compressed(residual, states)
                self._scored[pair].clear()

    def _add(self, name: str, gradient: Tensor | Factors) -> None:
        if isinstance(gradient, Tensor):
            return super()._add(name, gradient)
        known = self._factors.get(name)
        self._factors[name] = (
            Factors(*(torch.cat(sides, 1) for sides in zip(known, gradient, strict=True))) if known else gradient
        )

    def _gradient_of(self, layer: nn.Module, own: str, inputs: Tensor, output_gradient: Tensor) -> Tensor | Factors:
        if layer.get_parameter(own).ndim == 1:
            return super()._gradient_of(layer, own, inputs, output_gradient)
        a, delta = self._tokens.by_pair(inputs), self._tokens.by_pair(output_gradient).to(self._dtype)
        if isinstance(layer, nn.Embedding):
            return self._looked_up_factors(layer, a, delta)
        a, delta = a.flatten(1, -2).to(self._dtype), delta.flatten(1, -2)
        return self._compressed(*((a, delta) if isinstance(layer, Conv1D) else (delta, a)))

    def _looked_up_factors(self, layer: nn.Embedding, ids: Tensor, delta: Tensor) -> Factors:
        """Each token adds its δ to a row; compressed among the rows that the batch contains."""
        delta = delta * lookup_scale(layer, ids)
        if layer.padding_idx is not None:
            delta = delta * (ids != layer.padding_idx)[..., None]
        met, place = ids.unique(return_inverse=True)
        found = self._compressed(nn.functional.one_hot(place, len(met)).to(delta), delta)
        left = found.left.new_zeros(*found.left.shape[:2], len(layer.weight))
        return found._replace(left=left.index_copy(2, met, found.left))

    def _compressed(self, left: Tensor, right: Tensor) -> Factors:
        """Σ_t left_t right_tᵀ; both (n, tokens, …)."""
        return Factors(*low_rank(right, left, self._rank)[:2])


def measure_weight_factors(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    names: Collection[str],
    store: ShardStore,
    *,
    rank: int,
    packed: bool = True,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Write the factors of all pairs at the model's present parameters, in bfloat16; `read_weight_factors` reads them.

    Args:
        model: as of `batch_weight_factors`.
        pairs: all pairs.
        names: as of `batch_weight_factors`.
        store: where shards go; its key stands for the parameters, the pairs, `names` and `rank`.
        rank: as of `batch_weight_factors`.
        packed: compute each prompt once.
        progress: called with the number of pairs that all processes have finished so far, about.
    """
    run = GradientPass(model)

    def compute(view: nn.Module, batch: Sequence[EncodedPair]) -> dict[str, Tensor]:
        found = batch_weight_factors(view, batch, names, rank=rank, packed=packed)
        tensors = {"margin": found.margin.double(), "vectors": found.vectors.to(torch.bfloat16)}
        for name, own in found.matrices.items():
            tensors |= {f"{side}/{name}": value.to(torch.bfloat16) for side, value in own._asdict().items()}
        return tensors

    measure_blocks(model, pairs, store, lambda block: run(block, compute), block=PAIRS_PER_SHARD, progress=progress)


class MeasuredWeightFactors(NamedTuple):
    """A finished pass over m pairs, on the disk; as of `WeightFactors`."""

    margin: NDArray[np.float64]
    matrices: dict[str, tuple[ShardColumn, ShardColumn]]
    vectors: ShardColumn


def read_weight_factors(store: ShardStore, num_pairs: int, matrices: Collection[str]) -> MeasuredWeightFactors:
    """The results of `measure_weight_factors`, rows in the order of its pairs.

    Args:
        store: where they are.
        num_pairs: m.
        matrices: names of the parameters that are matrices.

    Raises:
        UserError: a shard is missing or damaged.
    """
    bounds = block_bounds(num_pairs, PAIRS_PER_SHARD)

    def column(name: str) -> ShardColumn:
        return ShardColumn(store, name, bounds)

    return MeasuredWeightFactors(
        column("margin").tensor().double().numpy(),
        {name: (column(f"left/{name}"), column(f"right/{name}")) for name in matrices},
        column("vectors"),
    )
