"""Statistics of rows on disk: the same in any blocks and any order, with resampling on some rows, in little memory."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import binom
from tests.reference.statistics import (
    reference_alignments,
    reference_distinguishability,
    reference_kernel,
    reference_off_diagonal_mean,
    reference_paired_alignments,
    reference_paired_distinguishability,
)

from foretune.statistics import behaviours, moments
from foretune.statistics.behaviours import (
    Measured,
    alignments,
    behaviour_rows,
    representatives,
    training_kernel,
)
from foretune.statistics.distinguishability import distinguishability
from foretune.statistics.samples import Differences, TwoClasses, whole_of_classes, whole_of_differences

DIM = 5
SIMULATIONS = 300


class OnDisk:
    """Gives float32 rows for indices alone, and remembers how many at a time."""

    def __init__(self, rows):
        self.rows, self.shape, self.largest = rows.astype(np.float32), rows.shape, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        self.largest = max(self.largest, len(rows))
        return self.rows[rows]


def measured(*, asks=40, writes=30, seed=0, order=None):
    """A Yes/No behaviour, one of free text, and some held-out pairs of both."""
    generator = np.random.default_rng(seed)
    count = asks + writes
    answer = np.concatenate([np.arange(asks) % 2, np.full(writes, -1)])
    first, chosen, rejected, sketch = generator.normal(size=(4, count, DIM)).astype(np.float32)
    first += np.where(answer == 0, 0.5, -0.5)[:, None]
    columns = [
        np.repeat(["asks", "writes"], [asks, writes]),
        np.where(np.arange(count) % 5 == 0, "test", "train"),
        1 + np.arange(count) % 3,
        answer,
        *(first, chosen + 0.5, rejected, sketch, sketch),
        generator.permutation(10**6)[:count],
    ]
    order = np.arange(count) if order is None else order
    columns = [column[order] for column in columns]
    columns[4:8] = map(OnDisk, columns[4:8])
    columns[8] = columns[7]
    return Measured(*columns)


def figures(data):
    """All numbers of all behaviours, and the alignment of each pair by its id."""
    rows = behaviour_rows(data, training_kernel(data), draws=40, seed=1)
    found = {
        (row["behaviour"], row["split"], name): value
        for row in rows
        for name, value in row.items()
        if isinstance(value, float)
    }
    return found | dict(zip(data.pair_id.tolist(), alignments(data).tolist(), strict=True))


def assert_same(left, right):
    assert left.keys() == right.keys()
    np.testing.assert_allclose([right[key] for key in left], list(left.values()), rtol=1e-10, atol=1e-10)


def test_small_blocks_change_nothing(monkeypatch):
    expected = figures(measured())
    monkeypatch.setattr(moments, "NUMBERS_AT_ONCE", 3 * DIM)
    data = measured()
    training_kernel(data)
    alignments(data)
    assert max(column.largest for column in (data.first_state, data.chosen_mean, data.sketch)) == 3
    assert_same(expected, figures(data))


@pytest.mark.parametrize("resampled", [4, 5])
def test_row_order_changes_nothing_where_some_rows_are_resampled(monkeypatch, resampled):
    monkeypatch.setattr(behaviours, "RESAMPLED_ROWS", resampled)
    monkeypatch.setattr(behaviours, "RARE_ROWS", 3)
    monkeypatch.setattr(moments, "NUMBERS_AT_ONCE", 7 * DIM)
    order = np.random.default_rng(3).permutation(70)
    assert_same(figures(measured(asks=40, writes=30)), figures(measured(asks=40, writes=30, order=order)))


def test_figures_of_all_rows_equal_the_slow_ones(monkeypatch):
    monkeypatch.setattr(behaviours, "RESAMPLED_ROWS", 10)
    monkeypatch.setattr(moments, "NUMBERS_AT_ONCE", 4 * DIM)
    data = measured()
    rows = {row["behaviour"]: row for row in behaviour_rows(data, training_kernel(data), draws=5, seed=0)[:2]}
    asks, writes = (data.members(name, "train") for name in ("asks", "writes"))
    plus, minus = (data.first_state.rows[asks[data.answer[asks] == side]].astype(float) for side in (0, 1))
    chosen, rejected = (column.rows[writes].astype(float) for column in (data.chosen_mean, data.rejected_mean))
    names = ("distinguishability", "distinguishability_debiased", "concentration", "trace")
    np.testing.assert_allclose(
        [rows["asks"][name] for name in names], reference_distinguishability(plus, minus), rtol=1e-9
    )
    np.testing.assert_allclose(
        [rows["writes"][name] for name in names[:2]], reference_paired_distinguishability(chosen, rejected), rtol=1e-9
    )
    kernel = reference_kernel(data.sketch.rows[writes].astype(float))
    np.testing.assert_allclose(rows["writes"]["generalised_distinguishability"], np.sqrt(kernel.mean()), rtol=1e-9)
    debiased = np.sqrt(max(reference_off_diagonal_mean(kernel), 0.0))
    np.testing.assert_allclose(rows["writes"]["generalised_distinguishability_debiased"], debiased, atol=1e-7)
    found = alignments(data)
    np.testing.assert_allclose(found[asks[data.answer[asks] == 0]], reference_alignments(plus, minus), rtol=1e-9)
    np.testing.assert_allclose(found[asks[data.answer[asks] == 1]], reference_alignments(minus, plus), rtol=1e-9)
    np.testing.assert_allclose(found[writes], reference_paired_alignments(chosen, rejected), rtol=1e-9)


def test_representatives_keep_shares_and_rare_answers():
    ids, strata = np.arange(10_000), np.where(np.arange(10_000) < 100, 0, 1)
    chosen = representatives(ids, strata, 2000)
    assert len(set(chosen.tolist())) == len(chosen)
    assert ((chosen < 100).sum(), (chosen >= 100).sum()) == (50, 1980)
    # ids in the order of the rows: the choice must not be the first ones
    assert 4000 < np.median(chosen[chosen >= 100]) < 6000
    np.testing.assert_array_equal(representatives(ids[:2000], strata[:2000], 2000), np.arange(2000))


def band(share):
    """Where 99.9 % of the observed shares lie if the true one is `share`."""
    return [edge / SIMULATIONS for edge in binom.interval(0.999, SIMULATIONS, share)]


def drawn(kind, generator, gap):
    """A sample of 60 of 600 rows, with the exact figures of all of them; 20 dimensions."""
    shift = gap / np.sqrt(20)
    if kind is TwoClasses:
        is_plus = np.arange(600) % 3 == 0
        rows = generator.normal(size=(600, 20)) + shift * is_plus[:, None]
        return TwoClasses(rows[:60], is_plus[:60]), whole_of_classes(rows, is_plus)
    chosen, rejected = generator.normal(size=(2, 600, 20)) + np.array([shift, 0.0])[:, None, None]
    return Differences(chosen[:60], rejected[:60]), whole_of_differences(chosen, rejected)


@pytest.mark.parametrize("kind", [TwoClasses, Differences])
def test_the_interval_of_all_rows_covers_when_some_are_resampled(kind):
    generator, covered, widths = np.random.default_rng(5), 0, []
    for seed in range(SIMULATIONS):
        sample, whole = drawn(kind, generator, 1.0)
        found = distinguishability(sample, draws=200, seed=seed, whole=whole)
        covered += found.low <= 1.0 <= found.high
        widths.append((found.high - found.low, np.ptp(distinguishability(sample, draws=200, seed=seed)[2:4])))
    low, high = band(0.95)
    assert low <= covered / SIMULATIONS <= high
    # ten times the rows: about a third of the width
    of_all, of_some = np.median(widths, axis=0)
    assert 0.2 < of_all / of_some < 0.5


@pytest.mark.parametrize("kind", [TwoClasses, Differences])
def test_noise_of_all_rows_exceeds_the_floor_of_some_one_time_in_twenty(kind):
    generator, exceeded = np.random.default_rng(6), 0
    for seed in range(SIMULATIONS):
        sample, whole = drawn(kind, generator, 0.0)
        found = distinguishability(sample, draws=200, seed=seed, whole=whole)
        exceeded += found.value > found.floor
    low, high = band(0.05)
    assert low <= exceeded / SIMULATIONS <= high


def test_memory_is_far_from_pairs_squared():
    data = measured(asks=12_000, writes=8_000)
    tracemalloc.start()
    figures(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # one byte a pair of pairs would be 400 MB
    assert peak < 40e6
