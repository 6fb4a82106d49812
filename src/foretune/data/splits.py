"""Held-out rows: split by prompt, drop leaks, keep at most so many; all by hashes, so without regard to row order."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from foretune.data.formats import Triple, two_answers
from foretune.data.rankings import Ranking

# A behaviour with more different answers than these has no two answers.
DISTINCT_ANSWERS = 100


class Pair(NamedTuple):
    """What is kept in memory of one usable row, a pair or a ranking; its texts are in a table.

    Attributes:
        behaviour: its behaviour.
        weight: its weight.
        pair_id: a hash of behaviour, triple and how often that has occurred before.
        prompt_key: a hash of prompt and seed, which decides what is held out.
        key: a hash of the triple.
        answers: chosen and rejected; None where they are conversations, free text, a ranking or not both there.
    """

    behaviour: str
    weight: float
    pair_id: int
    prompt_key: int
    key: int
    answers: tuple[str, str] | None


class PairMaker:
    """Makes pairs of triples.

    Args:
        seed: changes which prompts are held out.
    """

    def __init__(self, seed: int) -> None:
        """Nothing has occurred yet."""
        self._seed = seed
        self._seen: dict[str, Counter[int]] = {}
        self._couples: dict[str, dict[tuple[str, str], tuple[str, str]] | None] = {}

    def pair(self, behaviour: str, triple: Triple | Ranking, weight: float) -> Pair:
        """The next pair."""
        whole, seen = canonical(list(triple)), self._seen.setdefault(behaviour, Counter())
        key = stable_hash(whole)
        pair_id = stable_hash(behaviour, whole, seen[key])
        seen[key] += 1
        prompt_key = stable_hash(self._seed, canonical(triple.prompt))
        return Pair(behaviour, weight, pair_id, prompt_key, key, self._answers(behaviour, triple))

    def without_free_text(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Forget the answers of behaviours that turned out to have more than a few different ones."""
        return [
            pair if pair.answers is None or self._couples[pair.behaviour] is not None else pair._replace(answers=None)
            for pair in pairs
        ]

    def _answers(self, behaviour: str, triple: Triple | Ranking) -> tuple[str, str] | None:
        """One tuple for all equal couples of a behaviour."""
        couples = self._couples.setdefault(behaviour, {})
        if couples is None or isinstance(triple, Ranking) or not isinstance(triple.chosen, str):
            return None
        if not (triple.chosen and triple.rejected):
            return None
        couple = (triple.chosen, triple.rejected)
        if couple not in couples and len(couples) == DISTINCT_ANSWERS:
            self._couples[behaviour] = None
            return None
        return couples.setdefault(couple, couple)


def canonical(value: Any) -> str:
    """Return one text per value: JSON with sorted keys, in ASCII so that any text can be hashed."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)


def stable_hash(*parts: Any) -> int:
    """Return a hash in [0, 2**63) that is the same in every process, unlike Python's own."""
    digest = blake2b(canonical(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def held_out_prompts(pairs: Sequence[Pair], *, test_fraction: float) -> set[int]:
    """Choose the prompts (as prompt keys) to hold out, about `test_fraction` of each behaviour's.

    Behaviours are taken in sorted order; each holds out round(test_fraction * its number of prompts) of them, those
    already held out by an earlier behaviour first, then those with the lowest hash that no earlier behaviour keeps for
    training; of a two-answer behaviour equally many that prefer each answer, so that training stays as balanced as the
    data. Never are all prompts held out, and the only prompt of a behaviour never is.
    """
    # the example of a prompt: the pair with the first answers
    prompts: dict[str, dict[int, Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: canonical(pair.answers) if pair.answers else ""):
        prompts.setdefault(pair.behaviour, {}).setdefault(pair.prompt_key, pair)
    # A behaviour with a single prompt would have nothing to learn from without it.
    train = {next(iter(examples)) for examples in prompts.values() if len(examples) == 1}
    test: set[int] = set()
    for behaviour in sorted(prompts):
        examples = prompts.pop(behaviour)
        wanted = min(round(test_fraction * len(examples)), len(examples) - 1)
        ranked = _balanced([examples[key] for key in sorted(examples.keys() - train - test)])
        test.update(pair.prompt_key for pair in ranked[: max(0, wanted - len(examples.keys() & test))])
        train.update(examples.keys() - test)
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
    answers = two_answers(pair.answers or (None, None) for pair in ranked)
    if answers is None:
        return ranked
    by_answer = [[pair for pair in ranked if pair.answers and pair.answers[0] == answer] for answer in answers]
    shared = min(map(len, by_answer))
    alternating = [pair for couple in zip(*by_answer, strict=False) for pair in couple]
    return alternating + by_answer[0][shared:] + by_answer[1][shared:]
