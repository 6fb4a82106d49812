"""What a look at the end of a simulated run adds to margins of pairs that others stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.dynamics.closing_look import closing_look, with_look
from foretune.dynamics.simulated_run import SimulatedRun

BEHAVIOUR = np.repeat(["a", "b"], 6)
MEASURED = np.tile([True, True, True, False, False, False], 2)
ROWS = np.full(12, 2.0)


def pairs(seed):
    """True margins of a dozen pairs, and those of the measured pair that is each or stands for it."""
    true = np.random.default_rng(seed).normal(size=12) + 3 * (BEHAVIOUR == "b")
    place = np.tile([0, 1, 2, 0, 1, 2], 2) + np.repeat([0, 6], 6)
    return true, true[place]


@given(st.integers(0, 10**6), st.floats(0.5, 2.0), st.floats(-3.0, 3.0))
def test_a_look_that_is_first_order_but_for_scale_and_level_finds_every_pair(seed, scale, level):
    true, simulated = pairs(seed)
    found = closing_look(simulated, simulated, level + scale * true, MEASURED, BEHAVIOUR, ROWS)
    np.testing.assert_allclose(simulated + found.missed, true, atol=1e-9)
    assert found.explained == pytest.approx(1)


def test_measured_pairs_stay_as_they_are():
    true, simulated = pairs(0)
    looked = true + np.random.default_rng(1).normal(scale=0.1, size=12)
    found = closing_look(simulated, simulated, looked, MEASURED, BEHAVIOUR, ROWS)
    assert (found.missed[MEASURED] == 0).all()
    assert (found.missed[~MEASURED] != 0).all()


def test_pairs_that_none_has_learned_by_heart_lack_what_they_would_have():
    true, simulated = pairs(0)  # measured pairs, each of two rows, have 2 · 1.5 from their own two steps
    learned = simulated + 3.0
    looked = np.where(MEASURED, learned, true)
    recorded = learned - 1.5
    found = closing_look(learned, recorded, looked, MEASURED, BEHAVIOUR, ROWS)
    held = closing_look(learned, recorded, looked, MEASURED, BEHAVIOUR, np.where(MEASURED, 2.0, np.inf))
    np.testing.assert_allclose((recorded + found.missed)[~MEASURED], true[~MEASURED] + 1.5, atol=1e-9)
    np.testing.assert_allclose((recorded + held.missed)[~MEASURED], true[~MEASURED], atol=1e-9)


@pytest.mark.parametrize("looked", [np.random.default_rng(7).normal(size=12), np.zeros(12)])
def test_a_look_that_says_something_else_is_not_believed(looked):
    _, simulated = pairs(0)
    found = closing_look(simulated, simulated, looked, MEASURED, BEHAVIOUR, ROWS)
    assert found.explained < 0.8 and not found.believed


def test_chosen_scores_are_believed_with_the_margins_or_not_at_all():
    true, simulated = pairs(0)
    noise = np.random.default_rng(7).normal(size=12)
    both = np.concatenate([simulated, simulated])
    good = closing_look(both, both, np.concatenate([true, 2 * true]), MEASURED, BEHAVIOUR, ROWS)
    np.testing.assert_allclose(both + good.missed, np.concatenate([true, true]), atol=1e-9)
    bad = closing_look(both, both, np.concatenate([true, noise]), MEASURED, BEHAVIOUR, ROWS)
    assert good.believed and not bad.believed


def test_what_was_missed_grows_with_the_margins():
    run = SimulatedRun([0, 5, 10], np.array([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0]]), [], 10)
    missed = np.array([0.0, 2.0])
    for change, expected in ((4.0, [[0, 0], [1, 1.5], [4, 6]]), (8.0, [[0, 0], [1, 1.25], [4, 5]])):
        np.testing.assert_allclose(with_look(run, missed, np.full(2, change), 0.0).margins, expected)
    np.testing.assert_allclose(with_look(run, missed, np.full(2, -2.0), 0.0).margins, [[0, 0], [1, 2], [4, 6]])
    begun = with_look(run, missed, np.full(2, 4.0), np.array([0.0, -1.0])).margins
    np.testing.assert_allclose(begun, [[0, -1], [1, 0.75], [4, 6]])
    still = SimulatedRun([0, 5], np.zeros((2, 2)), [], 5)
    np.testing.assert_array_equal(with_look(still, missed, np.zeros(2), 0.0).margins, np.zeros((2, 2)))
