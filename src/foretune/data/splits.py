"""Held-out rows: split by prompt, drop leaks, keep at most so many; all by hashes, so without regard to row order."""

import json
from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.data.formats import Triple, two_answers
from foretune.data.pairs import Couple, Pair, Pairs
from foretune.data.rankings import Ranking

# A behaviour with more different answers than these has no two answers.
DISTINCT_ANSWERS = 100


class PairMaker:
    """Makes pairs of triples.

    Args:
        seed: changes which prompts are held out.
    """

    def __init__(self, seed: int) -> None:
        """Nothing has occurred yet."""
        self._seed = seed
        self._seen: dict[str, Counter[int]] = {}
        self._couples: dict[str, dict[Couple, Couple] | None] = {}

    def pair(self, behaviour: str, triple: Triple | Ranking, weight: float) -> Pair:
        """The next pair."""
        whole, seen = canonical(list(triple)), self._seen.setdefault(behaviour, Counter())
        key = stable_hash(whole)
        pair_id = stable_hash(behaviour, whole, seen[key])
        seen[key] += 1
        prompt_key = stable_hash(self._seed, canonical(triple.prompt))
        return Pair(behaviour, weight, pair_id, prompt_key, key, self._answers(behaviour, triple))

    def free_text(self) -> set[str]:
        """Behaviours that turned out to have more than a few different answers."""
        return {behaviour for behaviour, couples in self._couples.items() if couples is None}

    def _answers(self, behaviour: str, triple: Triple | Ranking) -> Couple | None:
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


def held_out_prompts(pairs: Pairs, *, test_fraction: float) -> NDArray[np.int64]:
    """Choose the prompts (as sorted prompt keys) to hold out, about `test_fraction` of each behaviour's.

    Behaviours are taken in sorted order; each holds out round(test_fraction * its number of prompts) of them, those
    already held out by an earlier behaviour first, then those with the lowest hash that no earlier behaviour keeps for
    training; of a two-answer behaviour equally many that prefer each answer, so that training stays as balanced as the
    data. Never are all prompts held out, and the only prompt of a behaviour never is.
    """
    keys, prompt = np.unique(pairs.prompt_key, return_inverse=True)
    train, test = np.zeros((2, len(keys)), dtype=bool)
    texts = [canonical(couple) if couple else "" for couple in pairs.couples]
    place = np.argsort(sorted(range(len(texts)), key=texts.__getitem__))[pairs.answers]
    groups = [_examples(pairs.prompt_key, place, rows) for _, rows in pairs.groups()]
    # A behaviour with a single prompt would have nothing to learn from without it.
    train[[prompt[rows[0]] for rows in groups if len(rows) == 1]] = True
    for rows in groups:
        own = prompt[rows]
        wanted = min(round(test_fraction * len(own)), len(own) - 1)
        ranked = _balanced(pairs, rows[~(train[own] | test[own])])
        test[prompt[ranked[: max(0, wanted - int(test[own].sum()))]]] = True
        train[own[~test[own]]] = True
    return keys[test]


def _examples(prompt_key: NDArray[np.int64], place: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """One of these rows for each prompt, that in the first place; sorted by prompt key."""
    rows = rows[np.lexsort((place[rows], prompt_key[rows]))]
    return rows[np.unique(prompt_key[rows], return_index=True)[1]]


def limit_pairs(pairs: Pairs, *, limit: int, seed: int) -> NDArray[np.bool_]:
    """Say which pairs to keep: at most `limit` of each behaviour, those with the lowest hashes.

    Of a two-answer behaviour equally many prefer each answer, as far as they go.
    """
    kept = np.zeros(len(pairs), dtype=bool)
    for _, rows in pairs.groups():
        ids = pairs.pair_id[rows]
        hashes = np.fromiter((stable_hash(seed, int(pair_id)) for pair_id in ids), np.int64, len(ids))
        kept[_balanced(pairs, rows[np.lexsort((ids, hashes))])[:limit]] = True
    return kept


def _balanced(pairs: Pairs, ranked: NDArray[np.int64]) -> NDArray[np.int64]:
    """Alternate between the two preferred answers; leave any other behaviour as it is."""
    codes, couple = np.unique(pairs.answers[ranked], return_inverse=True)
    couples = [pairs.couples[code] or (None, None) for code in codes]
    answers = two_answers(couples)
    if answers is None:
        return ranked
    first = np.array([chosen == answers[0] for chosen, _ in couples])[couple]
    turn = np.where(first, np.cumsum(first), np.cumsum(~first))
    return ranked[np.lexsort((~first, turn))]
