"""Pair gradients φ_i = ∇_θ margin_i of chosen parameters, many pairs in one forward and one backward pass.

The margin is log π(chosen) − log π(rejected), summed over response tokens; the reference drops out of its gradient.
Pairs do not interact, so the backward pass of the batch's summed margin holds the gradients of every pair, and the
layers that own the parameters tell them apart (`foretune.features.layer_gradients`). Nothing else is differentiated:
parameters are frozen meanwhile, the graph starts at the first chosen layer, and the output layer is differentiated in
closed form, so that logits are computed once, a chunk at a time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.features.blocks import block_bounds, measure_blocks
from foretune.features.caught import PairTokens
from foretune.features.gradient_pass import GradientPass, frozen
from foretune.features.head_gradient import HeadGradient, HeadReceiver, differentiate_head
from foretune.features.layer_gradients import LayerGradients
from foretune.features.store import ShardColumn, ShardStore
from foretune.models.attention import tree_attention_of
from foretune.models.batches import Targets, num_states, states_of, supports_packing, targets_of
from foretune.models.encoding import EncodedPair
from foretune.models.head import head_of
from foretune.models.kernels import FrozenKernels

PAIRS_PER_SHARD = 64


class PairGradients(NamedTuple):
    """Margins of n pairs and their gradients.

    Attributes:
        margin: log π(chosen) − log π(rejected) in nats, shape (n,).
        gradient: by parameter name, shape (n, coordinates): all coordinates in row-major order, or the sampled ones.
    """

    margin: Tensor
    gradient: dict[str, Tensor]


def trainable_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that require gradients, in the model's order; tied parameters appear once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def batch_gradients(
    model: torch.nn.Module,
    pairs: Sequence[EncodedPair],
    names: Collection[str],
    *,
    sampled: Mapping[str, Tensor] = MappingProxyType({}),
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PairGradients:
    """Gradients of one batch, in one pass, with the model in evaluation mode: no dropout.

    Args:
        model: a causal language model, plain or with PEFT adapters; it is left as it was.
        pairs: the batch; it is padded to its longest member.
        names: parameters, as `model.named_parameters()` calls them.
        sampled: by name, which coordinates of a parameter are wanted, row-major indices, ascending, shape (c,); the
            gradient of a parameter that is missing here is kept whole.
        packed: compute each prompt once (see `foretune.models.batches`).
        dtype: of the gradients.

    Returns:
        Margins in float32 (float64 for a float64 model), and gradients, on the model's device.

    Raises:
        UserError: a parameter whose gradient cannot be told apart by pair.
    """
    layers = LayerGradients(model, names, PairTokens(pairs), sampled=sampled, dtype=dtype)
    with layers.watching():
        own = differentiate_margins(model, pairs, packed=packed, receive=layers.receiver_of(head_of(model, live=True)))
    return PairGradients(own.margin, layers.finished())


def differentiate_margins(
    model: torch.nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    packed: bool = True,
    receive: HeadReceiver | None = None,
) -> HeadGradient:
    """One forward and one backward pass of the batch's summed margin, for layers that are being watched.

    Args:
        model: as of `batch_gradients`; evaluated without dropout, with all parameters frozen meanwhile.
        pairs: the batch.
        packed: compute each prompt once.
        receive: as of `differentiate_head`.
    """
    in_trees = tree_attention_of(model) if packed and supports_packing(model) else nullcontext()
    with frozen(model), in_trees, FrozenKernels():
        states = states_of(model, pairs, packed=packed)
        targets = Targets(*(part.to(states.device) for part in targets_of(pairs)))
        owner = torch.repeat_interleave(torch.tensor([num_states(pair) for pair in pairs])).to(states.device)
        own = differentiate_head(head_of(model, live=True), states.detach(), targets, owner, receive)
        if states.requires_grad:
            states.backward(own.states)
    return own


class MeasuredGradients(NamedTuple):
    """A finished pass over m pairs.

    Attributes:
        margin: log π(chosen) − log π(rejected), float64, shape (m,).
        gradient: φ, the coordinates of all parameters in the order of their names, shape (m, Σ c), on the disk.
    """

    margin: NDArray[np.float64]
    gradient: ShardColumn


def measure_gradients(
    model: torch.nn.Module,
    pairs: Sequence[EncodedPair],
    names: Collection[str],
    store: ShardStore,
    *,
    sampled: Mapping[str, Tensor],
    packed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Write the gradients of all pairs at the model's present parameters; `read_gradients` reads them.

    Args:
        model: as of `batch_gradients`.
        pairs: all pairs.
        names: parameters, as of `batch_gradients`.
        store: where shards go; its key stands for the parameters, the pairs, the coordinates and `dtype`.
        sampled: as of `batch_gradients`.
        packed: compute each prompt once.
        dtype: of the stored gradients; margins are stored in float64.
        progress: called with the number of pairs that all processes have finished so far, about.
    """
    run = GradientPass(model)

    def compute(view: torch.nn.Module, batch: Sequence[EncodedPair]) -> dict[str, Tensor]:
        found = batch_gradients(view, batch, names, sampled=sampled, packed=packed)
        return {"margin": found.margin.double(), "gradient": torch.cat(list(found.gradient.values()), 1).to(dtype)}

    measure_blocks(model, pairs, store, lambda block: run(block, compute), block=PAIRS_PER_SHARD, progress=progress)


def read_gradients(store: ShardStore, num_pairs: int) -> MeasuredGradients:
    """The results of `measure_gradients`, rows in the order of its pairs.

    Raises:
        UserError: a shard is missing or damaged.
    """
    bounds = block_bounds(num_pairs, PAIRS_PER_SHARD)
    margin, gradient = (ShardColumn(store, name, bounds) for name in ("margin", "gradient"))
    return MeasuredGradients(margin.tensor().numpy(), gradient)
