"""Attention over packed trees of tokens, registered with transformers as "foretune_tree".

It adds two things to transformers' own functions. Tokens of many pairs come in one line, without padding, and are
spread to a grid of rows for attention alone. And a beginning that rows have in common is computed once: its keys and
values are kept and seen by every row. Soft-capping (Gemma 2) works. Sliding windows and the tree itself are in the
mask, which the caller gives (`foretune.models.batches`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_attention

from foretune.models.head import causal_model
from foretune.models.product_attention import added, product_attention, suits_products

NAME = "foretune_tree"


class Layout(NamedTuple):
    """Where tokens that come in one line, row by row, belong in a grid of padded rows.

    Attributes:
        lengths: tokens of each row.
        place: each token's place in the flattened grid, shape (tokens,).
    """

    lengths: list[int]
    place: Tensor

    @property
    def length(self) -> int:
        """Of the grid."""
        return max(self.lengths)

    def spread(self, values: Tensor) -> Tensor:
        """(1, heads, tokens, dim) → (rows, heads, length, dim), zero at padding."""
        line = values[0].transpose(0, 1)
        grid = _Spread.apply(line, self.place, len(self.lengths) * self.length)
        return grid.unflatten(0, (-1, self.length)).transpose(1, 2)  # pyright: ignore

    def gather(self, values: Tensor) -> Tensor:
        """(rows, length, …) → (1, tokens, …)."""
        return _Gather.apply(values.flatten(0, 1), self.place)[None]  # pyright: ignore


class _Spread(torch.autograd.Function):
    """Places are unique, so both directions are plain copies (torch's own backward of indexing adds up)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(place)
        return values.new_zeros(count, *values.shape[1:]).index_copy_(0, place, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return gradients[0].index_select(0, place), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = len(values)
        return values.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (place,), (gradient,) = ctx.saved_tensors, gradients
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, place, gradient), None


class Beginning:
    """Keys and values of the tokens that rows begin with, layer by layer in the order of the pass.

    Attributes:
        length: number of tokens.
        layers: (key, value) of each attention layer, shape (1, heads, length, head_dim).
    """

    def __init__(self, length: int) -> None:
        """A beginning not yet computed."""
        self.length = length
        self.layers: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A forward pass inside keeps its keys and values here."""
        yield from _asking(lambda key, value: self.layers.append((key, value)))

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Rows of a forward pass inside, in this thread, see this beginning; a pass asks layer after layer."""
        layers = cycle(self.layers)
        yield from _asking(lambda key, value: next(layers))


def _asking(common: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    token = _BEGINNING.set(common)
    try:
        yield
    finally:
        _BEGINNING.reset(token)


# A layer's own keys and values → those that come before them
_BEGINNING: ContextVar[Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None] = ContextVar(
    "beginning", default=None
)


@contextmanager
def tree_attention_of(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` attends with `tree_attention`."""
    config = causal_model(model).config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: query (rows, heads, tokens, dim) → (rows, tokens, heads, dim).

    A mask with an attribute `grid` is of a pass of `foretune.models.batches`: True where a query sees a key, and no
    query sees a later one. If it is a `Layout`, the tokens come in one line and the mask is of the grid. (The layout
    travels with the mask because a recomputed forward pass gets the same mask.)
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not implemented")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout: Layout | None = getattr(attention_mask, "grid", None)
    common = _BEGINNING.get()
    first = common and common(key, value)
    length = query.shape[2] if layout is None else layout.length
    capped = softcap is not None and attention_mask is not None
    if not dropout and (capped or suits_products(query, attention_mask, length, first)):
        output = product_attention(
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            softcap=softcap,
            lengths=None if layout is None else layout.lengths,
            first=first,
            causal=hasattr(attention_mask, "grid"),
        )
        return output, None
    if layout is not None:
        query, key, value = layout.spread(query), layout.spread(key), layout.spread(value)
    if first is not None:
        copies = [common.expand(len(query), -1, -1, -1) for common in first]
        key, value = torch.cat([copies[0], key], 2), torch.cat([copies[1], value], 2)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)
    if softcap is None:
        usual, options = sdpa_attention_forward, kwargs
    else:  # with dropout, or without a mask
        usual, options = capped_attention, {"softcap": softcap}
        attention_mask = None if attention_mask is None else added(attention_mask, query.dtype)
    output, _ = usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    return output if layout is None else layout.gather(output), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
