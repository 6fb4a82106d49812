"""Batches side by side on a CPU's cores, each on its own, instead of one after the other on all of them.

Operations on one batch are too short to be divided well, and cores would wait for each other after each of them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# Beyond it, workers would wait for Python; they divide the threads among them.
MOST_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_workers(device: torch.device) -> int:
    """How many batches are computed at one time."""
    return min(torch.get_num_threads(), MOST_WORKERS) if device.type == "cpu" else 1


def side_by_side(compute: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """What `compute` makes of each item, in their order.

    Args:
        compute: called in other threads, where contexts of this one (but for gradients on or off) do not hold.
        items: any number.
        workers: how many at one time; 1: in this thread.
    """
    workers = min(workers, len(items))
    if workers < 2:
        return [compute(item) for item in items]
    threads, with_gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def in_worker(item: Item) -> Result:
        with torch.set_grad_enabled(with_gradients):
            return compute(item)

    try:
        with ThreadPoolExecutor(workers, "batches", torch.set_num_threads, (threads // workers,)) as pool:
            return list(pool.map(in_worker, items))
    finally:
        # what a worker sets for itself is also what threads to come begin with
        torch.set_num_threads(threads)
