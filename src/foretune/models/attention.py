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
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_attention

from foretune.models.dtype import float32_products_of
from foretune.models.head import causal_model

NAME = "foretune_tree"
# A beginning this many times as long as the rows' own tokens is multiplied once for all rows, not copied to each.
LONG_BEGINNING = 8
# Scores that exist at any one time: they stay in a CPU's cache; on other devices memory is the limit.
SCORES_AT_ONCE = {"cpu": 2**19}
SCORES_AT_ONCE_OF_OTHERS = 2**28
# Queries of a row at one time on a CPU: they need no scores with the keys that come after them.
QUERIES_AT_ONCE = 128


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

    A mask with an attribute `grid` is of a pass of `foretune.models.batches`: True where a query sees a key, and no
    query sees a later one. If it is a `Layout`, the tokens come in one line and the mask is of the grid. (The layout
    travels with the mask because a recomputed forward pass gets the same mask.)
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
    if first is not None and (dropout or first[0].shape[2] <= LONG_BEGINNING * query.shape[2]):
        copies = [common.expand(len(query), -1, -1, -1) for common in first]
        key, value, first = torch.cat([copies[0], key], 2), torch.cat([copies[1], value], 2), None
    if dropout and softcap is not None:
        mask = None if attention_mask is None else _added(attention_mask, query.dtype)
        output, _ = capped_attention(module, query, key, value, mask, dropout, scaling, softcap)
    elif dropout or (first is None and softcap is None and not _products_are_faster(query, attention_mask)):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        causal = hasattr(attention_mask, "grid")
        output = _Products.apply(query, key, value, attention_mask, first, scaling, softcap, causal)
    return output if layout is None else layout.gather(output), None  # pyright: ignore


def _products_are_faster(query: Tensor, mask: Tensor | None) -> bool:
    return query.device.type == "cpu" and mask is not None


class _Piece(NamedTuple):
    """Rows and queries whose scores exist at one time, and how many of the rows' keys they may see."""

    rows: slice
    queries: slice
    keys: int


def _pieces(query: Tensor, key: Tensor, length: int, *, causal: bool) -> Iterator[_Piece]:
    """Divide attention; `length`: of a common beginning."""
    rows, heads, tokens, _ = query.shape
    scores = SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE_OF_OTHERS)
    queries = QUERIES_AT_ONCE if causal and tokens >= 2 * QUERIES_AT_ONCE and query.device.type == "cpu" else tokens
    step = max(1, scores // (heads * queries * (length + key.shape[2])))
    for start in range(0, rows, step):
        for first in range(0, tokens, queries):
            last = min(first + queries, tokens)
            keys = key.shape[2] - tokens + last if causal else key.shape[2]
            yield _Piece(slice(start, start + step), slice(first, last), keys)


class _Products(torch.autograd.Function):
    """softmax(cap(scaling · q kᵀ) + mask) v by matrix products with float32 scores, which no one keeps.

    `first`: keys and values that all rows see, not copied, without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        first: tuple[Tensor, Tensor] | None,
        scaling: float,
        softcap: float | None,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = scaling, softcap, causal
        ctx.first = first
        length = 0 if first is None else first[0].shape[2]
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[3])
        with _exact(query):
            keys, values = _wide(key), _wide(value)
            for piece in _pieces(query, key, length, causal=causal):
                asked = _wide(query[piece.rows, :, piece.queries])
                weights, _ = _weights(asked, keys, mask, first, scaling, softcap, piece)
                seen = _weighted(weights[..., length:], values[piece.rows, :, : piece.keys])
                if first is not None:
                    seen = seen + _weighted_of_one(weights[..., :length], first[1])
                output[piece.rows, piece.queries] = seen.transpose(1, 2)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        query, key, value, mask = ctx.saved_tensors
        scaling, softcap, causal = ctx.options
        assert ctx.first is None, "a common beginning takes no gradients"
        with _exact(query):
            keys, values = _wide(key), _wide(value)
            of_query, of_key, of_value = query.new_empty(query.shape), torch.zeros_like(keys), torch.zeros_like(values)
            for piece in _pieces(query, key, 0, causal=causal):
                seen = piece.rows, slice(None), slice(piece.keys)
                asked = _wide(query[piece.rows, :, piece.queries])
                weights, slope = _weights(asked, keys, mask, None, scaling, softcap, piece)
                pulled = _wide(gradients[0][piece.rows, piece.queries].transpose(1, 2))
                of_weights = _scores(pulled, values[seen], 1.0)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                if slope is not None:
                    of_scores *= slope
                of_query[piece.rows, :, piece.queries] = _weighted(of_scores, keys[seen]).mul_(scaling)
                _add_products(of_key[seen], of_scores, asked, scaling)
                _add_products(of_value[seen], weights, pulled, 1.0)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None, None


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    first: tuple[Tensor, Tensor] | None,
    scaling: float,
    softcap: float | None,
    piece: _Piece,
) -> tuple[Tensor, Tensor | None]:
    """Attention weights of a piece, and the slope of the soft-capping if there is one."""
    scores = _scores(query, key[piece.rows, :, : piece.keys], scaling)
    if first is not None:
        scores = torch.cat([_scores_of_one(query, first[0], scaling), scores], -1)
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped.square()
    if mask is not None:
        scores += _added(mask[piece.rows, :, piece.queries, : scores.shape[-1]], scores.dtype)
    return torch.softmax(scores, -1), slope


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores: to add it to all heads is several times as fast as to fill it in."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@contextmanager
def _exact(query: Tensor) -> Iterator[None]:
    """Products of half-precision numbers are added in float32, whatever autocast would have."""
    with torch.autocast(query.device.type, enabled=False), float32_products_of(query.dtype):
        yield


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


def _add_products(total: Tensor, weights: Tensor, query: Tensor, scaling: float) -> None:
    """Add to `total`, of keys or values, what queries pull at each of them."""
    rows, heads, tokens, keys = weights.shape
    groups = weights.reshape(rows * total.shape[1], -1, keys).transpose(1, 2)
    asked = query.reshape(rows * total.shape[1], -1, query.shape[3])
    total.flatten(0, 1).baddbmm_(groups, asked, alpha=scaling)


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
    return values.to(wide, memory_format=torch.contiguous_format).contiguous()


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, eager_mask)
