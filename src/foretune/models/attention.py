"""Attention over packed trees of tokens, registered with transformers as "foretune_tree".

It adds two things to transformers' own functions. Tokens of many pairs come in one line, without padding, and are
spread to a grid of rows for attention alone. And a beginning that rows have in common is computed once: its keys and
values are kept and seen by every row. Soft-capping (Gemma 2) works. Sliding windows and the tree itself are in the
mask, which the caller gives (`foretune.models.batches`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from foretune.models.head import causal_model

NAME = "foretune_tree"
# Largest queries × keys of a row for which float32 products beat the fused kernel on a CPU; in bfloat16 they always do.
SMALL = 96 * 96
# A beginning this many times as long as the rows' own tokens is multiplied once for all rows, not copied to each.
LONG_BEGINNING = 8
# Scores that exist at any one time: they stay in a CPU's cache; on other devices memory is the limit.
SCORES_AT_ONCE = {"cpu": 2**19}
SCORES_AT_ONCE_OF_OTHERS = 2**28


class Layout(NamedTuple):
    """Where tokens that come in one line belong in a grid of padded rows.

    Attributes:
        rows: of the grid.
        length: of a row.
        place: each token's place in the flattened grid, shape (tokens,), no two alike.
    """

    rows: int
    length: int
    place: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(1, heads, tokens, dim) → (rows, heads, length, dim), zero at padding."""
        line = values[0].transpose(0, 1)
        return _Spread.apply(line, self.place, self.rows * self.length).unflatten(0, self[:2]).transpose(1, 2)  # pyright: ignore

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
        self._asked = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A forward pass inside keeps its keys and values here."""
        yield from self._active(recording=True)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Rows of a forward pass inside see this beginning."""
        yield from self._active(recording=False)

    def _active(self, *, recording: bool) -> Iterator[None]:
        token = _BEGINNING.set((self, recording))
        try:
            yield
        finally:
            _BEGINNING.reset(token)

    def next_layer(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer that asks; a pass asks for one layer after the other."""
        self._asked += 1
        return self.layers[(self._asked - 1) % len(self.layers)]


_BEGINNING: ContextVar[tuple[Beginning, bool] | None] = ContextVar("beginning", default=None)


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

    A mask with an attribute `grid` (a `Layout`) says that the tokens come in one line; it is of the grid, True where a
    query sees a key. (The layout travels with the mask because a recomputed forward pass gets the same mask.)
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not implemented")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layout: Layout | None = getattr(attention_mask, "grid", None)
    if layout is not None:
        query, key, value = layout.spread(query), layout.spread(key), layout.spread(value)
    first = None
    if (active := _BEGINNING.get()) is not None:
        beginning, recording = active
        if recording:
            beginning.layers.append((key, value))
        else:
            first = beginning.next_layer()
    if first is not None and first[0].shape[2] <= LONG_BEGINNING * query.shape[2]:
        copies = [common.expand(len(query), -1, -1, -1) for common in first]
        key, value, first = torch.cat([copies[0], key], 2), torch.cat([copies[1], value], 2), None
    if first is None and softcap is None and not _products_are_faster(query, key, attention_mask):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        output = _by_products(query, key, value, attention_mask, first, scaling, dropout, softcap)
    return output if layout is None else layout.gather(output), None


def _products_are_faster(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    if query.device.type != "cpu" or mask is None:
        return False
    return query.dtype == torch.bfloat16 or query.shape[2] * key.shape[2] <= SMALL


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    first: tuple[Tensor, Tensor] | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention with float32 scores, a few rows at a time; keys and values `first` are seen by all rows, not copied."""
    length = 0 if first is None else first[0].shape[2]
    scores_of_row = query.shape[1] * query.shape[2] * (length + key.shape[2])
    step = max(1, SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE_OF_OTHERS) // scores_of_row)
    parts = []
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        asked = _wide(query[rows])
        scores = _scores(asked, key[rows], scaling)
        if first is not None:
            scores = torch.cat([_scores_of_one(asked, first[0], scaling), scores], -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask[rows], torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores += mask[rows]
        weights = drop(torch.softmax(scores, -1), dropout)
        seen = _weighted(weights[..., length:], value[rows])
        if first is not None:
            seen = seen + _weighted_of_one(weights[..., :length], first[1])
        parts.append(seen.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Scaled products of queries and keys; heads that share a key head are one matrix."""
    rows, heads, tokens, dim = query.shape
    groups = query.reshape(rows * key.shape[1], -1, dim)
    keys = _wide(key).reshape(rows * key.shape[1], -1, dim)
    unused = groups.new_empty(1, 1, 1)
    return torch.baddbmm(unused, groups, keys.transpose(1, 2), beta=0, alpha=scaling).view(rows, heads, tokens, -1)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    rows, heads, tokens, keys = weights.shape
    groups = weights.reshape(rows * value.shape[1], -1, keys)
    return torch.bmm(groups, _wide(value).reshape(rows * value.shape[1], keys, -1)).view(rows, heads, tokens, -1)


def _scores_of_one(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The same where all rows see one row's keys, shape (1, heads, keys, head_dim): all rows are one matrix."""
    return _scores(_rows_as_tokens(query), key, scaling).unflatten(2, (len(query), -1))[0].transpose(0, 1)


def _weighted_of_one(weights: Tensor, value: Tensor) -> Tensor:
    return _weighted(_rows_as_tokens(weights), value).unflatten(2, (len(weights), -1))[0].transpose(0, 1)


def _rows_as_tokens(rows: Tensor) -> Tensor:
    """(rows, heads, tokens, n) → (1, heads, rows · tokens, n)."""
    return rows.transpose(0, 1).flatten(1, 2)[None]


def _wide(values: Tensor) -> Tensor:
    """Contiguous, and in float32 at least: both in one copy."""
    wide = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else values.dtype
    return values.to(wide, memory_format=torch.contiguous_format)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
