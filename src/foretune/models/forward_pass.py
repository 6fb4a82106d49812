"""Forward passes over many pairs, without gradients: no token is computed twice and nearly none is padding."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from foretune.models.attention import Beginning, tree_attention_of
from foretune.models.batches import num_states, packed_length, states_of, supports_packing, token_batches
from foretune.models.beginnings import group_by_beginning
from foretune.models.dtype import float32_products_of
from foretune.models.encoding import Tree
from foretune.models.kernels import FrozenKernels
from foretune.models.sharded import final_states, is_sharded
from foretune.models.workers import num_workers, side_by_side

# Tokens of a batch: few enough on a CPU that activations stay in its cache, enough on a GPU to fill it.
BUDGET = {"cpu": 1024}
BUDGET_OF_OTHERS = 16384
# What one more batch costs, in tokens: on a CPU small products are a little slower, on a GPU its launches take as long.
OVERHEAD = {"cpu": 64}
OVERHEAD_OF_OTHERS = 4096
# Tokens whose keys and values are kept at one time.
KEPT_TOKENS = 8192


class _Batch(NamedTuple):
    """Pairs that are computed together, by their number; `shared` tokens at their beginning are there already."""

    members: list[int]
    shared: int
    beginning: Beginning | None


class ForwardPass:
    """Hidden states of any number of pairs from one model whose weights do not change meanwhile.

    The prompt is computed once a pair, and a beginning that many prompts share (a template, a system prompt, a whole
    prompt with several pairs of responses) once for the whole pass.

    Args:
        model: a causal language model, on any device.
        packed: compute prompts once a pair (False: separate sequences and no shared beginnings, the slow way).
        share: compute common beginnings once (needs `packed`).
        budget: tokens of a batch with its padding; None: what suits the device.
        overhead: tokens that a shared beginning must save to be worth a batch of its own; None: what suits the device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        packed: bool = True,
        share: bool = True,
        budget: int | None = None,
        overhead: int | None = None,
    ) -> None:
        """Nothing is computed yet."""
        self.device, self._dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self._model, self._packed = model, packed
        self._share = share and packed and supports_packing(model)
        self._budget = budget or BUDGET.get(self.device.type, BUDGET_OF_OTHERS)
        self._overhead = OVERHEAD.get(self.device.type, OVERHEAD_OF_OTHERS) if overhead is None else overhead
        # where parameters are divided, all processes gather them in one order
        self._workers = 1 if is_sharded(model) else num_workers(self.device)
        self._beginnings: dict[tuple[int, ...], Beginning] = {}
        self._earlier: dict[tuple[int, ...], Beginning] = {}

    @torch.no_grad()
    def states(self, pairs: Sequence[Tree]) -> Tensor:
        """Final hidden states that predict response tokens, shape (Σ num_states, hidden), in the order of `pairs`."""
        parts: list[Tensor] = [torch.empty(0)] * len(pairs)
        # what no pair of the call before began with is forgotten: a template is there in each of them
        self._earlier, self._beginnings = self._beginnings, {}
        in_trees = tree_attention_of(self._model) if self._share else nullcontext()
        with in_trees, float32_products_of(self._dtype) if self._share else nullcontext():
            for batches in self._waves(pairs):
                # the largest first, so that no worker ends late
                batches.sort(key=lambda batch: -sum(packed_length(pairs[member]) for member in batch.members))
                results = side_by_side(partial(self._compute, pairs), batches, self._workers)
                for batch, found in zip(batches, results, strict=True):
                    for member, part in zip(batch.members, found, strict=True):
                        parts[member] = part
        self._earlier = {}
        return torch.cat(parts)

    def _waves(self, pairs: Sequence[Tree]) -> Iterator[list[_Batch]]:
        """All batches, those together whose beginnings are kept at one time."""
        groups = group_by_beginning(pairs, overhead=self._overhead) if self._share else [(0, [*range(len(pairs))])]
        wave, kept = [], 0
        for length, members in groups:
            if wave and kept + length > KEPT_TOKENS:
                yield wave
                wave, kept = [], 0
            kept += length
            beginning = self._beginning(pairs[members[0]].prompt_ids[:length]) if length else None
            group = [pairs[index] for index in members]
            for batch in token_batches(group, budget=self._budget, shared=length, multiple_of=self._workers):
                wave.append(_Batch([members[place] for place in batch], length, beginning))
        yield wave

    def _compute(self, pairs: Sequence[Tree], batch: _Batch) -> tuple[Tensor, ...]:
        rows = [pairs[member] for member in batch.members]
        with batch.beginning.seen() if batch.beginning else nullcontext(), self._kernels():
            found = states_of(self._model, rows, packed=self._packed, shared=batch.shared)
        return found.split([num_states(pair) for pair in rows])

    def _kernels(self) -> AbstractContextManager:
        return FrozenKernels() if (self.device.type, self._dtype) == ("cpu", torch.float32) else nullcontext()

    def _beginning(self, tokens: list[int]) -> Beginning:
        """The beginning's keys and values: kept ones, or computed; the longest unused are forgotten first."""
        key = tuple(tokens)
        kept = self._beginnings.pop(key, None) or self._earlier.pop(key, None) or self._computed(tokens)
        self._beginnings[key] = kept
        while len(self._beginnings) > 1 and sum(map(len, self._beginnings)) > KEPT_TOKENS:
            del self._beginnings[next(iter(self._beginnings))]
        return kept

    def _computed(self, tokens: list[int]) -> Beginning:
        beginning = Beginning(len(tokens))
        ids = torch.tensor([tokens], device=self.device)
        with beginning.recorded(), self._kernels():
            final_states(self._model, input_ids=ids)
        return beginning
