"""The first pairs in the order of the audit stand for all: herding beside its slow twin, and what it is for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference.statistics import distances_of_next
from tests.statistics.test_behaviours import measured

from foretune.statistics import behaviours, herding
from foretune.statistics.herding import herded, representative_rank


@given(st.integers(0, 1000), st.integers(1, 25), st.integers(1, 5))
def test_each_row_is_the_best_next_one(seed, count, dim):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    order = herded(rows).tolist()
    assert sorted(order) == list(range(count))
    for number, place in enumerate(order):
        distances = distances_of_next(rows, order[:number])
        assert distances[place] <= distances.min() + 1e-7


def test_the_first_few_have_the_means_of_all_where_drawn_ones_do_not():
    generator, ours, drawn = np.random.default_rng(0), [], []
    for _ in range(100):
        rows = generator.normal(size=(100, 8)) + generator.normal(size=8)
        directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        # of the second degree in the direction, with noise that no feature predicts
        value = directions @ generator.normal(size=8) + (directions @ generator.normal(size=8)) ** 2
        value += 0.2 * value.std() * generator.normal(size=100)
        ours.append(value[herded(rows)[:15]].mean() - value.mean())
        drawn.append(value[generator.permutation(100)[:15]].mean() - value.mean())
    assert np.std(ours) < 0.6 * np.std(drawn)


def test_scale_says_nothing_and_a_row_without_direction_is_no_obstacle():
    rows = np.random.default_rng(1).normal(size=(30, 4))
    scaled = rows * np.random.default_rng(2).uniform(0.1, 10, size=(30, 1))
    assert herded(rows).tolist() == herded(scaled).tolist()
    rows[3] = 0
    assert sorted(herded(rows)) == list(range(30))


def test_each_behaviour_and_split_has_an_order_of_its_own_whatever_the_order_of_rows():
    generator = np.random.default_rng(3)
    data = measured(generator)
    rank = representative_rank(data)
    for name in ("asks", "writes"):
        for split in ("train", "test"):
            members = data.members(name, split)
            assert sorted(rank[members]) == list(range(len(members)))
            assert members[herded(data.sketch[members])].tolist() == members[np.argsort(rank[members])].tolist()
    order = generator.permutation(len(rank))
    moved = data._replace(**{field: getattr(data, field)[order] for field in data._fields})
    np.testing.assert_array_equal(representative_rank(moved), rank[order])


def test_of_a_large_behaviour_some_are_ordered_and_the_others_follow(monkeypatch):
    data = measured(np.random.default_rng(4))
    monkeypatch.setattr(herding, "CANDIDATES", 5)
    monkeypatch.setattr(behaviours, "RARE_ROWS", 1)
    rank, members = representative_rank(data), data.members("asks", "train")
    assert sorted(rank[members]) == list(range(len(members)))
    late = members[np.argsort(rank[members])][5:]
    assert np.all(np.diff(data.pair_id[late]) > 0)


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows(count):
    assert sorted(herded(np.ones((count, 3)))) == list(range(count))
