"""A feature pass over many pairs: a block of pairs a shard, blocks divided over the processes, resumable."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune import processes
from foretune.features.store import ShardStore
from foretune.memory import give_back
from foretune.models.encoding import EncodedPair
from foretune.models.sharded import keep_company


def block_bounds(count: int, block: int) -> NDArray[np.int64]:
    """Where each block of pairs begins, and where the last one ends, shape (blocks + 1,)."""
    return np.array([*range(0, count, block), count])


def measure_blocks(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    store: ShardStore,
    compute: Callable[[Sequence[EncodedPair]], dict[str, Tensor]],
    *,
    block: int,
    progress: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Write what `compute` makes of each block of pairs; shards already there under the same key are kept.

    Args:
        model: that `compute` runs; where its parameters are divided, all processes must run it equally often.
        pairs: all pairs.
        store: where shards go.
        compute: tensors by name, on any device.
        block: pairs of a shard.
        progress: called with the number of pairs that all processes have finished so far, about.
    """
    bounds = block_bounds(len(pairs), block)
    missing = processes.on_main(lambda: _missing(store, len(bounds) - 1))
    left = len(missing)
    progress(max(0, len(pairs) - left * block))
    for index in processes.mine(missing):
        found = compute(pairs[bounds[index] : bounds[index + 1]])
        store.write(index, {name: tensor.cpu() for name, tensor in found.items()})
        del found
        give_back()
        left = max(0, left - processes.count())
        progress(max(0, len(pairs) - left * block))
    keep_company(model)
    processes.together()


def _missing(store: ShardStore, count: int) -> list[int]:
    store.discard_foreign(count)
    return [index for index in range(count) if not store.has(index)]
