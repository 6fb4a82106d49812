"""Attention by plain matrix products, a cache-full of scores at a time; the backward pass computes scores again.

On CPUs this takes half the time of PyTorch's fused kernels or less: those run at a tenth of the products' speed. Rows
may come in one line, each of its own length, without padding.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foretune.models.dtype import float32_products_of

# A beginning this many times as long as the rows' own tokens is multiplied once for all rows, not copied to each.
LONG_BEGINNING = 8
# Scores that exist at any one time: they stay in a CPU's cache; on other devices memory is the limit.
SCORES_AT_ONCE = {"cpu": 2**19}
SCORES_AT_ONCE_OF_OTHERS = 2**28
# On CPUs long rows are cut into parts of this many queries or more, which need no scores with the keys after them.
QUERIES_AT_ONCE = 128

# What `_room` gives to each thread, and how many numbers it keeps at most.
_ROOMS = threading.local()
LARGEST_ROOM = 2**23


def product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    lengths: Sequence[int] | None = None,
    first: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(cap(scaling · q kᵀ) + mask) v; products of half-precision numbers are added in float32.

    Args:
        query: shape (rows, heads, tokens, dim), or in a line (1, heads, tokens of all rows, dim).
        key: the same with as many heads or a divisor of it; in a grid there may be more tokens.
        value: as `key`.
        mask: shape (rows, 1, tokens, keys): True where a query sees a key, or numbers to add to the scores.
        scaling: of the products.
        softcap: Gemma 2's c in c·tanh(scores/c).
        lengths: of the rows in a line; None: a grid.
        first: keys and values of shape (1, heads, tokens, dim) that come before those of every row, without gradients.
        causal: no query sees a later key, and the last query is at the last key.

    Returns:
        Shape (rows, tokens, heads, dim), or in a line (1, tokens, heads, dim).
    """
    return _Products.apply(query, key, value, mask, first, _Options(scaling, softcap, lengths, causal))  # pyright: ignore


def suits_products(query: Tensor, mask: Tensor | None, length: int, first: tuple[Tensor, Tensor] | None) -> bool:
    """Whether products are faster than a fused kernel: on CPUs, and where a long beginning need not be copied.

    Args:
        query: whose device counts.
        mask: None: the fused kernel is causal by itself.
        length: of a row.
        first: as of `product_attention`.
    """
    long_beginning = first is not None and first[0].shape[2] > LONG_BEGINNING * length
    return mask is not None and (long_beginning or query.device.type == "cpu")


class _Options(NamedTuple):
    scaling: float
    softcap: float | None
    lengths: Sequence[int] | None
    causal: bool


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        first: tuple[Tensor, Tensor] | None,
        options: _Options,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.first, ctx.options = first, options
        output = query.new_empty(len(query), query.shape[2], query.shape[1], value.shape[3])
        with _added_in_float32(query):
            for rows in _rows_at_once(query, key, first, options):
                asked, common, copied = rows.of(query), first, (None, None)
                if first is not None and first[0].shape[2] <= LONG_BEGINNING * asked.shape[2]:
                    common, copied = None, first
                keys, values = rows.of(key, copied[0]), rows.of(value, copied[1])
                length = 0 if common is None else common[0].shape[2]
                bias, seen = rows.of_mask(mask, asked.dtype), asked.new_empty(*asked.shape[:3], values.shape[3])
                for part in _queries_at_once(asked, options):
                    stop = keys.shape[2] - asked.shape[2] + part.stop if options.causal else keys.shape[2]
                    own = asked[:, :, part].contiguous()
                    weights, _ = _weights(own, keys[:, :, :stop], bias[:, :, part], common, options)
                    seen[:, :, part] = _weighted(weights[..., length:], values[:, :, :stop])
                    if common is not None:
                        seen[:, :, part] += _weighted_of_one(weights[..., :length], common[1])
                rows.put(output, seen)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        assert ctx.first is None, "a common beginning takes no gradients"
        query, key, value, mask = ctx.saved_tensors
        options: _Options = ctx.options
        pulls = [part.new_empty(part.transpose(1, 2).shape) for part in (query, key, value)]
        with _added_in_float32(query):
            for rows in _rows_at_once(query, key, None, options):
                asked, keys, values = rows.of(query), rows.of(key), rows.of(value)
                pulled, bias = rows.of(gradients[0].transpose(1, 2)), rows.of_mask(mask, asked.dtype)
                of_query, of_key, of_value = (torch.empty_like(part) for part in (asked, keys, values))
                for part in reversed(_queries_at_once(asked, options)):  # the last ones see all keys
                    stop = keys.shape[2] - asked.shape[2] + part.stop if options.causal else keys.shape[2]
                    seen, more = (slice(None), slice(None), slice(stop)), part.stop < asked.shape[2]
                    own, pull = asked[:, :, part].contiguous(), pulled[:, :, part].contiguous()
                    weights, slope = _weights(own, keys[seen], bias[:, :, part], None, options)
                    of_scores = _scores(pull, values[seen], 1.0, room=1)
                    torch._softmax_backward_data(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
                    if slope is not None:
                        of_scores *= slope
                    of_query[:, :, part] = _weighted(of_scores, keys[seen]).mul_(options.scaling)
                    _collect(of_key[seen], of_scores, own, options.scaling, more=more)
                    _collect(of_value[seen], weights, pull, 1.0, more=more)
                for whole, own in zip(pulls, (of_query, of_key, of_value), strict=True):
                    rows.put(whole, own)
        return *(part.transpose(1, 2) for part in pulls), None, None, None


class _Rows(NamedTuple):
    """Rows whose scores exist at one time.

    Attributes:
        rows: of the mask.
        tokens: of the line; None: a grid.
        lengths: of the rows.
    """

    rows: slice
    tokens: slice | None
    lengths: list[int]

    def of(self, values: Tensor, first: Tensor | None = None) -> Tensor:
        """Their part of (rows, heads, tokens, dim) or a line, padded to the longest, contiguous, at least float32.

        `first`, of shape (1, heads, tokens, dim), is laid before each row.
        """
        own = values[self.rows] if self.tokens is None else values[:, :, self.tokens]
        if self.tokens is None or len(self.lengths) == 1:
            return _wide(own if first is None else torch.cat([first.expand(len(own), -1, -1, -1), own], 2))
        line = (own if first is None else torch.cat([first, own], 2))[0].transpose(0, 1)
        places = _places(tuple(self.lengths), 0 if first is None else first.shape[2], str(values.device))
        return _wide(line.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2))

    def of_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to their scores."""
        length = max(self.lengths)
        beginning = mask.shape[3] - mask.shape[2]
        return added(mask[self.rows, :, :length, : beginning + length], dtype)

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Write (rows, heads, tokens, dim) into their part of (rows, tokens, heads, dim) or a line."""
        values = values.transpose(1, 2)
        if self.tokens is None:
            whole[self.rows] = values
        elif len(self.lengths) == 1:
            whole[:, self.tokens] = values
        else:
            # the first copy joins heads, the second leaves the padding out
            grid = values.to(whole.dtype, memory_format=torch.contiguous_format).flatten(0, 1)
            torch.index_select(grid, 0, _kept(tuple(self.lengths), str(whole.device)), out=whole[0, self.tokens])


@functools.lru_cache(maxsize=256)
def _places(lengths: tuple[int, ...], before: int, device: str) -> Tensor:
    """Which token of a line stands where in a grid of rows, shape (rows, before + longest).

    Every row begins with the line's first `before` tokens; its padding repeats its last token, so that numbers that are
    not finite stay in their row.
    """
    own, longest = torch.tensor(lengths), torch.arange(max(lengths))
    starts = own.cumsum(0) - own
    places = before + starts[:, None] + torch.minimum(longest, own[:, None] - 1)
    return torch.cat([torch.arange(before).expand(len(lengths), -1), places], 1).to(device)


@functools.lru_cache(maxsize=256)
def _kept(lengths: tuple[int, ...], device: str) -> Tensor:
    """Places of all tokens but the padding in a flattened grid of rows."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0].to(device)


def _rows_at_once(
    query: Tensor, key: Tensor, first: tuple[Tensor, Tensor] | None, options: _Options
) -> Iterator[_Rows]:
    lengths = options.lengths or [query.shape[2]] * len(query)
    keys_before = (0 if first is None else first[0].shape[2]) + (
        0 if options.lengths else key.shape[2] - query.shape[2]
    )
    limit = SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE_OF_OTHERS) // query.shape[1]
    start = place = 0
    while start < len(lengths):
        stop, longest = start, 0
        while stop < len(lengths):
            longest = max(longest, lengths[stop])
            if stop > start and (stop + 1 - start) * longest * (longest + keys_before) > limit:
                break
            stop += 1
        own = list(lengths[start:stop])
        tokens = slice(place, place + sum(own)) if options.lengths else None
        yield _Rows(slice(start, stop), tokens, own)
        start, place = stop, place + sum(own)


def _queries_at_once(query: Tensor, options: _Options) -> list[slice]:
    tokens = query.shape[2]
    count = max(1, tokens // QUERIES_AT_ONCE) if query.device.type == "cpu" else 1
    edges = [tokens * i // count for i in range(count + 1)]
    return [slice(*own) for own in zip(edges, edges[1:], strict=False)]


def _weights(
    query: Tensor, key: Tensor, bias: Tensor, first: tuple[Tensor, Tensor] | None, options: _Options
) -> tuple[Tensor, Tensor | None]:
    """Attention weights, and the slope of the soft-capping if there is one."""
    scores = _scores(query, key, options.scaling)
    if first is not None:
        scores = torch.cat([_scores_of_one(query, first[0], options.scaling), scores], -1)
    slope = None
    if options.softcap is not None:
        capped = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * capped, 1 - capped.square()
    scores.add_(bias[..., : scores.shape[-1]])
    return torch._softmax(scores, -1, False, out=scores), slope


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores: to add it to all heads is several times as fast as to fill it in."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


@contextmanager
def _added_in_float32(query: Tensor) -> Iterator[None]:
    """Products of half-precision numbers, whatever autocast would have; and no mode looks at each operation."""
    precision = float32_products_of(query.dtype)
    with torch.autocast(query.device.type, enabled=False), precision, torch._C.DisableTorchFunction():
        yield


def _scores(query: Tensor, key: Tensor, scaling: float, *, room: int = 0) -> Tensor:
    """Scaled products of queries and keys; heads that share a key head are one matrix.

    What is in a room (`_room`) is lost with the next scores there.
    """
    rows, heads, tokens, dim = query.shape
    groups = query.reshape(rows * key.shape[1], -1, dim)
    keys = _wide(key).reshape(rows * key.shape[1], -1, dim)
    unused, scores = groups.new_empty(1, 1, 1), _room(room, groups, (len(groups), groups.shape[1], keys.shape[1]))
    torch.baddbmm(unused, groups, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    return scores.view(rows, heads, tokens, -1)


def _room(number: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory that this thread uses again: on a CPU to fetch new memory for scores takes as long as to compute them."""
    size, rooms, name = prod(shape), _ROOMS.__dict__, (number, like.dtype)
    if like.device.type != "cpu" or size > LARGEST_ROOM:
        return like.new_empty(shape)
    if name not in rooms or len(rooms[name]) < size:
        with torch.inference_mode(False):  # so that gradients may use it, too
            rooms[name] = torch.empty(size, dtype=like.dtype)
    return rooms[name][:size].view(shape)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    rows, heads, tokens, keys = weights.shape
    groups = weights.reshape(rows * value.shape[1], -1, keys)
    return torch.bmm(groups, _wide(value).reshape(rows * value.shape[1], keys, -1)).view(rows, heads, tokens, -1)


def _collect(total: Tensor, weights: Tensor, query: Tensor, scaling: float, *, more: bool) -> None:
    """What queries pull at each key or value: written to `total`, or added if there is `more`."""
    rows, heads, tokens, keys = weights.shape
    groups = weights.reshape(rows * total.shape[1], -1, keys).transpose(1, 2)
    asked = query.reshape(rows * total.shape[1], -1, query.shape[3])
    total.flatten(0, 1).baddbmm_(groups, asked, beta=int(more), alpha=scaling)


def _scores_of_one(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The same where all rows see one row's keys, shape (1, heads, keys, head_dim): all rows are one matrix."""
    return _scores(_rows_as_tokens(query), key, scaling, room=1).unflatten(2, (len(query), -1))[0].transpose(0, 1)


def _weighted_of_one(weights: Tensor, value: Tensor) -> Tensor:
    return _weighted(_rows_as_tokens(weights), value).unflatten(2, (len(weights), -1))[0].transpose(0, 1)


def _rows_as_tokens(rows: Tensor) -> Tensor:
    """(rows, heads, tokens, n) → (1, heads, rows · tokens, n)."""
    return rows.transpose(0, 1).flatten(1, 2)[None]


def _wide(values: Tensor) -> Tensor:
    """Contiguous, and in float32 at least: both in one copy."""
    wide = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else values.dtype
    return values.to(wide, memory_format=torch.contiguous_format).contiguous()
