"""Which rows share the beginning of their prompt, and how much of it is worth computing once for all of them."""

from collections.abc import Sequence
from typing import NamedTuple

from foretune.models.encoding import Tree


class Group(NamedTuple):
    """Rows that begin with the same `length` tokens (0: nothing is shared)."""

    length: int
    members: list[int]


def group_by_beginning(pairs: Sequence[Tree], *, overhead: int) -> list[Group]:
    """Divide `pairs` so that the fewest tokens are computed.

    The prompts are a tree of prefixes; a group is one of its nodes, and costs the node's depth, once, and what its rows
    have beyond it. Each group costs `overhead` tokens more, since its rows are batched apart from all others. The last
    prompt token is never shared: its hidden state is scored, row by row.

    Returns:
        Groups of indices into `pairs`, each index once.
    """
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].prompt_ids)
    prompts = [pairs[index].prompt_ids for index in order]
    _, groups = _cheapest(prompts, 0, len(prompts), overhead) if prompts else (0, [])
    return [Group(length, order[start:stop]) for length, start, stop in groups]


def _cheapest(prompts: list[list[int]], start: int, stop: int, overhead: int) -> tuple[int, list[tuple[int, int, int]]]:
    """The least cost of sorted prompts start..stop−1 and the groups (length, start, stop) that reach it."""
    common = _common_prefix(prompts[start], prompts[stop - 1])  # of sorted rows: of all between, too
    shared = min(common, min(len(prompts[row]) for row in range(start, stop)) - 1) if stop - start > 1 else 0
    beyond = sum(len(prompts[row]) - shared for row in range(start, stop))
    whole = shared + beyond + overhead
    if beyond <= overhead or prompts[start] == prompts[stop - 1]:  # one more group would cost more than it saves
        return whole, [(shared, start, stop)]
    cost, groups = 0, []
    while start < stop:
        end = start + 1
        while end < stop and prompts[end][common : common + 1] == prompts[start][common : common + 1]:
            end += 1
        part, found = _cheapest(prompts, start, end, overhead)
        cost, groups, start = cost + part, groups + found, end
    return (cost, groups) if cost < whole else (whole, [(shared, groups[0][1], stop)])


def _common_prefix(left: list[int], right: list[int]) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
