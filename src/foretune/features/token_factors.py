"""Margins linear in the weights of adapted layers: G_i = ∂margin_i/∂W of each layer, as a few outer products.

With the inputs a_t of a linear layer and the gradients δ_t at its output, G = Σ_t δ_t a_tᵀ over the tokens of a pair.
Its rank is at most the number of tokens and mostly far less matters, so G ≈ Σ_k u_k v_kᵀ is kept, found by a
randomised range finder with power iterations (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.3). What a
change ΔW of all layers does to the margin is then Σ_k u_kᵀ ΔW v_k in first order, whatever parameters make ΔW.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.features.blocks import block_bounds, measure_blocks
from foretune.features.caught import PairTokens, catching
from foretune.features.gradient_pass import GradientPass
from foretune.features.pair_gradients import differentiate_margins
from foretune.features.store import ShardColumn, ShardStore
from foretune.models.encoding import EncodedPair

# Columns of the random sketch beyond the rank, and power iterations: both sharpen the range that is found.
EXTRA_COLUMNS = 4
POWER_ITERATIONS = 1
PAIRS_PER_SHARD = 64


class AdaptedLayer(NamedTuple):
    """A linear layer with LoRA matrices: W + scaling · B A.

    Attributes:
        name: of the layer, as `model.named_modules()` calls it.
        a: name of the parameter A, shape (r, in).
        b: name of the parameter B, shape (out, r).
        scaling: s.
        dropout: probability with which training drops an input of A.
    """

    name: str
    a: str
    b: str
    scaling: float
    dropout: float


class TokenFactors(NamedTuple):
    """Margins of n pairs and their gradients by layer.

    Attributes:
        margin: log π(chosen) − log π(rejected) in nats, shape (n,).
        outputs: u by layer name, shape (n, rank, out).
        inputs: v by layer name, shape (n, rank, in).
        lost: share of Σ ‖G‖² over the layers that the outer products leave out, shape (n,).
    """

    margin: Tensor
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    lost: Tensor


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers that LoRA changes, in the model's order.

    Raises:
        UserError: no adapters, or adapters that do more than add B A to a linear layer.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapter = module.active_adapters[0]
        if not isinstance(module, LoraLinear) or module.use_dora[adapter] or module.lora_bias[adapter]:
            raise UserError(
                f"the adapter of {name} does more than add B·A to a linear layer: use --twin tangent for it."
            )
        a, b = (f"{name}.lora_{part}.{adapter}.weight" for part in "AB")
        dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
        found.append(AdaptedLayer(name, a, b, float(module.scaling[adapter]), dropout))
    if not found:
        raise UserError("the model has no LoRA adapters: use --twin tangent, which takes any trainable parameters.")
    return found


def batch_factors(
    model: nn.Module, pairs: Sequence[EncodedPair], layers: Sequence[AdaptedLayer], *, rank: int, packed: bool = True
) -> TokenFactors:
    """Factors of one batch, in one forward and one backward pass, with the model in evaluation mode: no dropout.

    Args:
        model: a causal language model with LoRA adapters; it is left as it was.
        pairs: the batch.
        layers: of `adapted_layers`.
        rank: outer products kept for each pair and layer; exact where a pair has no more tokens.
        packed: compute each prompt once (see `foretune.models.batches`).

    Returns:
        Everything in float32 (float64 for a float64 model), on the model's device.
    """
    tokens, found = PairTokens(pairs), {}
    names = {model.get_submodule(layer.name): layer.name for layer in layers}

    def receive(layer: nn.Module, inputs: Tensor, output_gradient: Tensor) -> None:
        a, delta = (_exact(tokens.by_pair(part)) for part in (inputs, output_gradient))
        found[names[layer]] = low_rank(a, delta, rank)

    with catching(names, receive):
        margin = differentiate_margins(model, pairs, packed=packed).margin
    total = torch.stack([part.squared_norm for part in found.values()]).sum(0)
    kept = torch.stack([part.right.square().sum((1, 2)) for part in found.values()]).sum(0)
    return TokenFactors(
        margin,
        {layer.name: found[layer.name].left for layer in layers},
        {layer.name: found[layer.name].right for layer in layers},
        (1 - kept / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=0),
    )


def measure_factors(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    layers: Sequence[AdaptedLayer],
    store: ShardStore,
    *,
    rank: int,
    packed: bool = True,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Write the factors of all pairs at the model's present parameters, in bfloat16; `read_factors` reads them.

    Args:
        model: as of `batch_factors`.
        pairs: all pairs.
        layers: of `adapted_layers`.
        store: where shards go; its key stands for the parameters, the pairs and `rank`.
        rank: as of `batch_factors`.
        packed: compute each prompt once.
        progress: called with the number of pairs that all processes have finished so far, about.
    """
    run = GradientPass(model)

    def compute(view: nn.Module, batch: Sequence[EncodedPair]) -> dict[str, Tensor]:
        return _stacked(batch_factors(view, batch, layers, rank=rank, packed=packed), view, layers)

    measure_blocks(model, pairs, store, lambda block: run(block, compute), block=PAIRS_PER_SHARD, progress=progress)


def _stacked(found: TokenFactors, model: nn.Module, layers: Sequence[AdaptedLayer]) -> dict[str, Tensor]:
    tensors = {"margin": found.margin.double(), "lost": found.lost.float()}
    for number, alike in enumerate(layers_alike(model, layers)):
        for side in ("outputs", "inputs"):
            stack = torch.stack([getattr(found, side)[layer.name] for layer in alike], 1)
            tensors[f"{side}.{number}"] = stack.to(torch.bfloat16)
    return tensors


def layers_alike(model: nn.Module, layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """The layers in groups that have matrices of one shape, scaling and dropout."""
    groups: dict[tuple, list[AdaptedLayer]] = {}
    for layer in layers:
        shapes = (model.get_parameter(layer.a).shape, model.get_parameter(layer.b).shape)
        groups.setdefault((*shapes, layer.scaling, layer.dropout), []).append(layer)
    return list(groups.values())


class MeasuredFactors(NamedTuple):
    """A finished pass over m pairs.

    Attributes:
        margin: log π(chosen) − log π(rejected), float64, shape (m,).
        lost: share of the gradients' squared norm that the factors leave out, shape (m,).
        stacks: u (m, L, rank, out) and v (m, L, rank, in) of each group of `layers_alike`, on the disk.
    """

    margin: NDArray[np.float64]
    lost: NDArray[np.float32]
    stacks: list[tuple[ShardColumn, ShardColumn]]


def read_factors(store: ShardStore, num_pairs: int, num_groups: int) -> MeasuredFactors:
    """The results of `measure_factors`, rows in the order of its pairs.

    Raises:
        UserError: a shard is missing or damaged.
    """
    bounds = block_bounds(num_pairs, PAIRS_PER_SHARD)

    def column(name: str) -> ShardColumn:
        return ShardColumn(store, name, bounds)

    return MeasuredFactors(
        column("margin").tensor().double().numpy(),
        column("lost").tensor().numpy(),
        [(column(f"outputs.{number}"), column(f"inputs.{number}")) for number in range(num_groups)],
    )


class LowRank(NamedTuple):
    """G ≈ leftᵀ right for each of n matrices; the rows of `left` are orthonormal, or G is exact.

    Attributes:
        left: shape (n, rank, out).
        right: shape (n, rank, in).
        squared_norm: ‖G‖² in the Frobenius norm, shape (n,).
    """

    left: Tensor
    right: Tensor
    squared_norm: Tensor


def low_rank(a: Tensor, delta: Tensor, rank: int) -> LowRank:
    """G = Σ_t δ_t a_tᵀ compressed to `rank` outer products; a (n, tokens, in), δ (n, tokens, out)."""
    columns = min(rank + EXTRA_COLUMNS, *a.shape[1:], delta.shape[2])
    draw = torch.Generator().manual_seed(a.shape[2])
    sketch = torch.randn(a.shape[2], columns, generator=draw, dtype=a.dtype).to(a.device)
    basis = torch.linalg.qr(delta.transpose(1, 2) @ (a @ sketch))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(a.transpose(1, 2) @ (delta @ basis))[0]
        basis = torch.linalg.qr(delta.transpose(1, 2) @ (a @ basis))[0]
    right = (delta @ basis).transpose(1, 2) @ a
    # the strongest `rank` directions of the range that was found
    gram = right @ right.transpose(1, 2)
    # of a pair with fewer tokens than columns, numbers remain so small that `eigh` can make NaN of them
    gram.masked_fill_(gram.abs() < torch.finfo(gram.dtype).eps ** 2 * gram.amax((1, 2), keepdim=True), 0)
    strengths, turn = torch.linalg.eigh(gram)
    turn = turn[:, :, strengths.shape[1] - min(rank, columns) :].transpose(1, 2)
    left, right = turn @ basis.transpose(1, 2), turn @ right
    squared_norm = ((a @ a.transpose(1, 2)) * (delta @ delta.transpose(1, 2))).sum((1, 2))
    padding = (0, 0, 0, rank - left.shape[1])
    left, right = (torch.nn.functional.pad(side, padding) for side in (left, right))
    return LowRank(left, right, squared_norm)


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
