"""Pair gradients φ_i = ∇_θ margin_i of chosen parameters, many pairs in one forward and one backward pass.

The margin is log π(chosen) − log π(rejected), summed over response tokens; the reference drops out of its gradient.
Pairs do not interact, so the backward pass of the batch's summed margin holds the gradients of every pair, and the
layers that own the parameters tell them apart (`foretune.features.layer_gradients`). Nothing else is differentiated:
parameters are frozen meanwhile, the graph starts at the first chosen layer, and the output layer is differentiated in
closed form, so that logits are computed once, a chunk at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from foretune.features.caught import PairTokens
from foretune.features.head_gradient import HeadGradient, differentiate_head
from foretune.features.layer_gradients import LayerGradients
from foretune.features.store import ShardStore
from foretune.models.attention import tree_attention_of
from foretune.models.batches import Targets, num_states, states_of, supports_packing, targets_of, token_batches
from foretune.models.encoding import EncodedPair
from foretune.models.head import head_of
from foretune.models.kernels import FrozenKernels


class PairGradients(NamedTuple):
    """Margins of n pairs and their gradients.

    Attributes:
        margin: log π(chosen) − log π(rejected) in nats, shape (n,).
        gradient: by parameter name, shape (n, coordinates): the parameter's coordinates in row-major order.
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
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PairGradients:
    """Gradients of one batch, in one pass, with the model in evaluation mode: no dropout.

    Args:
        model: a causal language model, plain or with PEFT adapters; it is left as it was.
        pairs: the batch; it is padded to its longest member.
        names: parameters, as `model.named_parameters()` calls them. A pair's gradient is kept whole, so they should be
            LoRA matrices, norms, or the weights of a few layers, not of a whole large model.
        packed: compute each prompt once (see `foretune.models.batches`).
        dtype: of the gradients.

    Returns:
        Margins in float32 (float64 for a float64 model), and gradients, on the model's device.

    Raises:
        UserError: a parameter whose gradient cannot be told apart by pair.
    """
    layers = LayerGradients(model, names, PairTokens(pairs), dtype=dtype)
    head = head_of(model, live=True)
    weight, bias = layers.name_of(head.weight), layers.name_of(head.bias)
    with layers.watching():
        own = differentiate_margins(model, pairs, packed=packed, weights=bool(weight or bias))
    for name, gradient in ((weight, own.weight), (bias, own.bias)):
        if name is not None and gradient is not None:
            layers.add(name, gradient)
    return PairGradients(own.margin, layers.finished())


def differentiate_margins(
    model: torch.nn.Module, pairs: Sequence[EncodedPair], *, packed: bool = True, weights: bool = False
) -> HeadGradient:
    """One forward and one backward pass of the batch's summed margin, for layers that are being watched.

    Args:
        model: as of `batch_gradients`; evaluated without dropout, with all parameters frozen meanwhile.
        pairs: the batch.
        packed: compute each prompt once.
        weights: whether the output layer's own gradients are wanted.
    """
    in_trees = tree_attention_of(model) if packed and supports_packing(model) else nullcontext()
    with _frozen(model), in_trees, FrozenKernels():
        states = states_of(model, pairs, packed=packed)
        targets = Targets(*(part.to(states.device) for part in targets_of(pairs)))
        owner = torch.repeat_interleave(torch.tensor([num_states(pair) for pair in pairs])).to(states.device)
        own = differentiate_head(head_of(model, live=True), states.detach(), targets, owner, weights=weights)
        if states.requires_grad:
            states.backward(own.states)
    return own


def measure_pair_gradients(
    model: torch.nn.Module,
    pairs: Sequence[EncodedPair],
    names: Collection[str],
    store: ShardStore,
    *,
    packed: bool = True,
    budget: int = 2048,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Write the gradients of all pairs, a batch a shard; shards already there under the same key are kept.

    Args:
        model: as of `batch_gradients`.
        pairs: all pairs.
        names: parameters, as of `batch_gradients`.
        store: where shards go; its key stands for the weights, the pairs, the parameters, `budget` and `dtype`.
        packed: compute each prompt once.
        budget: tokens of a batch, with its padding.
        dtype: of the stored gradients; margins are stored in float64.
        progress: called with the number of pairs finished so far.
    """
    done = 0
    for index, batch in enumerate(token_batches(pairs, budget=budget)):
        if not store.has(index):
            found = batch_gradients(model, [pairs[i] for i in batch], names, packed=packed, dtype=dtype)
            gradient = {name: value.cpu() for name, value in found.gradient.items()}
            store.write(index, gradient | {"margin": found.margin.double().cpu()})
        done += len(batch)
        progress(done)


def read_pair_gradients(
    store: ShardStore, pairs: Sequence[EncodedPair], names: Collection[str], *, budget: int = 2048
) -> PairGradients:
    """Read a finished pass back, rows in the order of `pairs`; `names` may be some of those measured."""
    batches = list(token_batches(pairs, budget=budget))
    order = torch.argsort(torch.tensor([index for batch in batches for index in batch]))

    def column(name: str) -> Tensor:
        return torch.cat([store.read(index, name, len(batch)) for index, batch in enumerate(batches)])[order]

    return PairGradients(column("margin"), {name: column(name) for name in names})


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter requires gradients: a weight gradient of the whole batch is of no use."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
