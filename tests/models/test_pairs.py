"""Encoded pairs in arrays and a file are the pairs that were given."""

import tracemalloc

import numpy as np
import pytest

from foretune.models import pairs as module
from foretune.models.batches import num_states
from foretune.models.encoding import EncodedPair
from foretune.models.pairs import EncodedPairs
from foretune.records.provenance import pairs_hash


def made(count, length=3):
    for index in range(count):
        yield EncodedPair(
            2**62 + index,
            "zeta" if index % 3 else "alpha",
            "test" if index % 4 == 3 else "train",
            1.0 + index / 7,
            list(range(index % 5, index % 5 + length)),
            [7] * (index % length),
            [2**31 - 1, index],
            index % 2 == 0,
        )


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_they_come_out_as_they_went_in(monkeypatch, at_once):
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", at_once)
    expected = list(made(11))
    found = EncodedPairs(iter(expected))
    assert len(found) == 11
    assert list(found) == expected
    assert [found[index] for index in range(-11, 11)] == expected * 2
    assert (found[3:6], found[::-2], found[4:4]) == (expected[3:6], expected[::-2], [])
    assert pairs_hash(found) == pairs_hash(expected)
    with pytest.raises(IndexError):
        found[11]


def test_columns_say_the_same_as_the_pairs():
    expected = list(made(10))
    found = EncodedPairs(expected)
    assert found.names == ["alpha", "zeta"]
    assert found.behaviour_of.tolist() == [pair.behaviour for pair in expected]
    assert found.split_of.tolist() == [pair.split for pair in expected]
    assert found.weight.tolist() == [pair.weight for pair in expected]
    assert found.pair_id.tolist() == [pair.pair_id for pair in expected]
    assert found.truncated.tolist() == [pair.truncated for pair in expected]
    assert found.num_states.tolist() == [num_states(pair) for pair in expected]


def test_no_pairs():
    found = EncodedPairs([])
    assert (len(found), list(found), found.names, found.split_of.tolist()) == (0, [], [], [])


def test_long_texts_take_no_memory():
    tracemalloc.start()
    pairs = EncodedPairs(made(10_000, length=100))
    gathered, _ = tracemalloc.get_traced_memory()
    assert sum(len(pair.prompt_ids) for pair in pairs) == 1_000_000
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert gathered / 10_000 < 100
    assert after - gathered < 100_000
    assert np.dtype(module.COLUMNS).itemsize < 50
