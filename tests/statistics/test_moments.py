"""Moments are those of all rows at once, however the rows are grouped."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.reference.statistics import reference_moments

from foretune.statistics.moments import covariance, empty, merge, of_rows, operator_norm, trace

DIM = 3
ROWS = st.integers(0, 6).flatmap(lambda count: arrays(float, (count, DIM), elements=st.floats(-100, 100)))


def assert_same(left, right):
    assert left.count == right.count
    np.testing.assert_allclose(left.mean, right.mean, atol=1e-9)
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-9, atol=1e-7)


@given(ROWS, ROWS, ROWS)
def test_merging_is_associative_and_equal_to_all_rows_at_once(first, second, third):
    a, b, c = of_rows(first), of_rows(second), of_rows(third)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(merge(a, b), c), of_rows(np.concatenate([first, second, third])))


@given(ROWS, ROWS)
def test_merging_is_commutative(first, second):
    assert_same(merge(of_rows(first), of_rows(second)), merge(of_rows(second), of_rows(first)))


@given(ROWS)
def test_the_empty_state_changes_nothing(rows):
    state = of_rows(rows)
    assert_same(merge(empty(DIM), state), state)
    assert_same(merge(state, empty(DIM)), state)


@given(ROWS)
def test_mean_and_covariance_equal_the_reference(rows):
    state = of_rows(rows)
    mean, expected = reference_moments(rows)
    np.testing.assert_allclose(state.mean, mean, atol=1e-10)
    np.testing.assert_allclose(covariance(state), expected, atol=1e-9)


@given(ROWS)
def test_trace_and_operator_norm_equal_numpy(rows):
    state = of_rows(rows)
    if len(rows) < 2:
        assert np.isnan([trace(state), operator_norm(state)]).all()
        return
    expected = np.cov(rows.T)
    np.testing.assert_allclose(trace(state), np.trace(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(operator_norm(state), np.linalg.norm(expected, 2), rtol=1e-9, atol=1e-9)


def test_one_row_and_no_row():
    row = np.array([[1.0, -2.0, 3.0]])
    one, none = of_rows(row), of_rows(row[:0])
    assert (one.count, none.count) == (1, 0)
    np.testing.assert_array_equal(one.mean, row[0])
    assert not one.scatter.any()
    assert np.isnan(covariance(one)).all() and np.isnan(covariance(none)).all()
    assert_same(merge(none, none), empty(DIM))


def test_a_large_common_mean_does_not_drown_the_spread():
    rows = np.random.default_rng(0).normal(size=(200, DIM))
    state = empty(DIM)
    for part in np.split(rows + 1e7, 20):
        state = merge(state, of_rows(part))
    np.testing.assert_allclose(covariance(state), np.cov(rows.T), atol=1e-6)
