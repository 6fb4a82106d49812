"""Forward and backward passes over many pairs, a batch on each core of a CPU."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from foretune.models.batches import packed_length, token_batches
from foretune.models.dtype import exact_float32_products
from foretune.models.encoding import EncodedPair
from foretune.models.evaluating import evaluating
from foretune.models.sharded import is_sharded
from foretune.models.workers import num_workers, side_by_side

# Tokens whose activations exist at one time.
BUDGET = 2048

# (model, batch) → tensors by name, one row a pair
OfBatch = Callable[[nn.Module, Sequence[EncodedPair]], dict[str, Tensor]]


class GradientPass:
    """Batches side by side, each on a view of the model: its parameters in modules of its own.

    So each batch has its own hooks and settings. On a CPU float32 products are exact meanwhile, also in attention: it
    would set the precision of the whole process, which no other batch must meet.

    Args:
        model: a causal language model, on any device; its parameters are the same in all calls of this pass.
        budget: tokens of all batches at one time, with their padding.
    """

    def __init__(self, model: nn.Module, *, budget: int = BUDGET) -> None:
        """Nothing is computed yet."""
        self._model, self._budget = model, budget
        device = next(model.parameters()).device
        self._workers = 1 if is_sharded(model) else num_workers(device)
        self._products = exact_float32_products if device.type == "cpu" else nullcontext
        self._views: list[nn.Module] = [model]

    def __call__(self, pairs: Sequence[EncodedPair], compute: OfBatch) -> dict[str, Tensor]:
        """What `compute` makes of all pairs, rows in their order, on the model's device.

        Args:
            pairs: at least one.
            compute: called with a view of the model, evaluated without dropout and frozen, and a batch.
        """
        workers = max(1, min(self._workers, self._budget // max(map(packed_length, pairs))))
        batches = list(token_batches(pairs, budget=self._budget // workers, multiple_of=workers))
        idle: list[nn.Module] = []

        def of(batch: list[int]) -> dict[str, Tensor]:
            view = idle.pop()
            try:
                return compute(view, [pairs[index] for index in batch])
            finally:
                idle.append(view)

        with frozen(self._model), self._products():
            while len(self._views) < min(workers, len(batches)):
                self._views.append(_view(self._model))
            idle += self._views
            parts = side_by_side(of, batches, workers)
        order = torch.argsort(torch.tensor([*chain(*batches)]))
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter requires gradients: a weight gradient of a whole batch is of no use."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _view(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers, the same tensors, in a copy of its modules."""
    return copy.deepcopy(model, {id(own): own for own in chain(model.parameters(), model.buffers())})
