"""Held-out rows: split by prompt, drop leaks, keep at most so many; all by hashes, so without regard to row order."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from foretune.data.formats import Triple, two_answers


@dataclass(slots=True)
class Pair:
    """One usable row. `prompt_key` and `key` are equal exactly for equal prompts and equal triples."""

    behaviour: str
    triple: Triple
    weight: float
    extras: dict[str, Any] = field(default_factory=dict)
    prompt_key: str = ""
    key: str = ""
    pair_id: int = 0

    def __post_init__(self) -> None:
        """Compute both keys."""
        self.prompt_key = canonical(self.triple.prompt)
        self.key = canonical(list(self.triple))


def canonical(value: Any) -> str:
    """Return one text per value: JSON with sorted keys, in ASCII so that any text can be hashed."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)


def stable_hash(*parts: Any) -> int:
    """Return a hash in [0, 2**63) that is the same in every process, unlike Python's own."""
    digest = blake2b(canonical(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def number_pairs(pairs: Iterable[Pair]) -> None:
    """Give each pair its id: a hash of behaviour, triple and how often that has occurred before."""
    seen: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        pair.pair_id = stable_hash(pair.behaviour, pair.key, seen[pair.behaviour, pair.key])
        seen[pair.behaviour, pair.key] += 1


def held_out_prompts(pairs: Sequence[Pair], *, test_fraction: float, seed: int) -> set[str]:
    """Choose the prompts (as prompt keys) to hold out, about `test_fraction` of each behaviour's.

    Behaviours are taken in sorted order; each holds out round(test_fraction * its number of prompts) of them, those
    already held out by an earlier behaviour first, then those with the lowest hash that no earlier behaviour keeps for
    training; of a two-answer behaviour equally many that prefer each answer, so that training stays as balanced as the
    data. Never are all prompts held out, and the only prompt of a behaviour never is.
    """
    prompts: dict[str, set[str]] = {}
    examples: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: pair.key):
        prompts.setdefault(pair.behaviour, set()).add(pair.prompt_key)
        examples.setdefault((pair.behaviour, pair.prompt_key), pair)
    rank = {key: (stable_hash(seed, key), key) for key in set().union(*prompts.values())}
    # A behaviour with a single prompt would have nothing to learn from without it.
    train = {next(iter(keys)) for keys in prompts.values() if len(keys) == 1}
    test: set[str] = set()
    for behaviour in sorted(prompts):
        keys = prompts[behaviour]
        wanted = min(round(test_fraction * len(keys)), len(keys) - 1)
        free = sorted(keys - train - test, key=rank.__getitem__)
        ranked = _balanced([examples[behaviour, key] for key in free])
        test.update(pair.prompt_key for pair in ranked[: max(0, wanted - len(keys & test))])
        train.update(keys - test)
    return test


def limit_pairs(pairs: Sequence[Pair], *, limit: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Keep at most `limit` pairs of each behaviour, those with the lowest hashes.

    Of a two-answer behaviour equally many prefer each answer, as far as they go.

    Returns:
        (kept, surplus), both in the order of `pairs`.
    """
    by_behaviour: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_behaviour.setdefault(pair.behaviour, []).append(pair)
    chosen_ids: set[int] = set()
    for group in by_behaviour.values():
        ranked = sorted(group, key=lambda pair: (stable_hash(seed, pair.pair_id), pair.pair_id))
        chosen_ids.update(pair.pair_id for pair in _balanced(ranked)[:limit])
    kept = [pair for pair in pairs if pair.pair_id in chosen_ids]
    return kept, [pair for pair in pairs if pair.pair_id not in chosen_ids]


def _balanced(ranked: list[Pair]) -> list[Pair]:
    """Alternate between the two preferred answers; leave any other behaviour as it is."""
    answers = two_answers((pair.triple.chosen, pair.triple.rejected) for pair in ranked)
    if answers is None:
        return ranked
    by_answer = [[pair for pair in ranked if pair.triple.chosen == answer] for answer in answers]
    shared = min(map(len, by_answer))
    alternating = [pair for couple in zip(*by_answer, strict=False) for pair in couple]
    return alternating + by_answer[0][shared:] + by_answer[1][shared:]
