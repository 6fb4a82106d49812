"""A layer's input a and the gradient δ at its output, caught for every token of a batch during one backward pass.

With them the gradient of a linear layer's weight is Σ δ aᵀ over tokens (Goodfellow, arXiv 1510.01799), and over the
tokens of one pair it is that pair's own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foretune.models.batches import packed_length
from foretune.models.encoding import EncodedPair

# (layer, a of shape (rows, tokens, …), δ of shape (rows, tokens, …))
Receiver = Callable[[nn.Module, Tensor, Tensor], None]
# (layer, its arguments, its keyword arguments, its output) → a
InputOf = Callable[[nn.Module, tuple, dict[str, Any], Tensor], Tensor]


class PairTokens:
    """Which tokens of a batch belong to which pair.

    A forward pass gives layers either all tokens in one line, shape (1, tokens, …) or (1, heads, tokens, …), or padded
    rows, as many for each pair, shape (rows, …); see `foretune.models.batches.states_of`. At padding δ is zero.

    Args:
        pairs: the batch.
    """

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        """Count the pairs' tokens."""
        self.lengths = [packed_length(pair) for pair in pairs]

    def fit(self, values: Tensor) -> bool:
        """Whether it can be told which tokens `values` belong to."""
        if self._in_line(values):
            return len(self._axes(values)) == 1
        return values.ndim > 1 and len(values) in (len(self.lengths), 2 * len(self.lengths))

    def owner(self, values: Tensor) -> Tensor:
        """The pair of each token of `values.flatten(0, 1)`, of shape (rows, tokens, …): shape (rows · tokens,)."""
        count = len(self.lengths)
        repeats = self.lengths if self._in_line(values) else [values.shape[:2].numel() // count] * count
        return torch.repeat_interleave(torch.tensor(repeats, device=values.device))

    def by_pair(self, values: Tensor) -> Tensor:
        """Tokens that fit, as (pairs, tokens, …), zero at the padding that this adds."""
        if not self._in_line(values):
            return values.unflatten(0, (len(self.lengths), -1)).flatten(1, 2)
        (axis,) = self._axes(values)
        return pad_sequence(list(values.movedim(axis, 1)[0].split(self.lengths)), batch_first=True)

    def _in_line(self, values: Tensor) -> bool:
        return len(values) == 1 < len(self.lengths)

    def _axes(self, values: Tensor) -> list[int]:
        """Which axes can be that of the tokens; the last is that of features, except of token ids."""
        return [axis for axis in range(1, max(2, values.ndim - 1)) if values.shape[axis] == sum(self.lengths)]


@contextmanager
def catching(
    layers: Iterable[nn.Module],
    receive: Receiver,
    *,
    input_of: InputOf = lambda layer, args, kwargs, output: args[0],
) -> Iterator[None]:
    """Hand over a and δ of each call of `layers` when the backward pass reaches it.

    The graph of a forward pass in which nothing else requires gradients starts at these layers. The input is saved and
    freed like every other activation.

    Args:
        layers: whose forward passes, within this context, are watched.
        receive: called with layer, a and δ; calls of layers that it makes itself are not watched.
        input_of: what is handed over as a, from a layer's call.
    """
    receiving = False

    def watch(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        def hand_over(inputs: Tensor, output_gradient: Tensor) -> None:
            nonlocal receiving
            receiving = True
            try:
                receive(layer, inputs, output_gradient)
            finally:
                receiving = False

        start = torch.empty(0, requires_grad=True)
        return None if receiving else _Catch.apply(output, input_of(layer, args, kwargs, output), start, hand_over)

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Catch(torch.autograd.Function):
    """The identity on a layer's output; its backward hands over the layer's input and the output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, start: Tensor, hand_over: Callable) -> Tensor:  # noqa: D102
        # `start` requires gradients, hence so does what is returned, whether or not anything before it does
        ctx.save_for_backward(inputs)
        ctx.hand_over = hand_over
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple:  # noqa: D102 # pyright: ignore
        ctx.hand_over(ctx.saved_tensors[0], output_gradient)
        return output_gradient, None, None, None
