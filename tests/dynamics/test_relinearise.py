"""Anchors are taken where they are due, and step control keeps the error at the tolerance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretune.dynamics.confidence import confidence, likely_error
from foretune.dynamics.relinearise import (
    FEWEST_PAIRS,
    LARGEST_COST,
    LARGEST_COST_OF_ALL,
    MOST_PAIRS,
    MOST_PASSES,
    MOST_TEXTS,
    Drift,
    Relinearisation,
    affordable_interval,
    affordable_texts,
)


class Curve:
    """Margins that are first-order around `at` of exp(θ) − 1, one parameter, two pairs."""

    def __init__(self, at):
        self.at = torch.tensor([float(at)])

    def start(self):
        return {"t": self.at}

    def margins(self, parameters, pairs, *, training=False):
        value = torch.exp(self.at) - 1 + torch.exp(self.at) * (parameters["t"] - self.at)
        return value.repeat(len(pairs)) * torch.tensor([1.0, -2.0])[pairs]


def run(*, every=0, steps=40, speed=0.1, **more):
    """θ grows by `speed` a step."""
    made = Relinearisation(
        Curve(0.0),
        0,
        lambda step, parameters: Curve(parameters["t"]),
        np.arange(2),
        np.array(["a", "b"]),
        every=every,
        **more,
    )
    for step in range(1, steps):
        made(step, {"t": torch.tensor([speed * step])})
    return made.drifts


def test_fixed_intervals():
    assert [(drift.since, drift.step) for drift in run(every=12)] == [(0, 12), (12, 24), (24, 36)]
    assert run() == []


def test_the_error_is_that_of_the_extrapolation():
    first = run(every=10)[0]
    change, expected = np.exp(1.0) - 1, 1.0
    assert first.error == pytest.approx((change - expected) / change, rel=1e-5)
    assert first.errors == pytest.approx({"a": first.error, "b": first.error})


@pytest.mark.parametrize("tolerance", [0.05, 0.2])
@pytest.mark.parametrize("speed", [0.02, 0.1])
def test_step_control_reaches_the_tolerance(tolerance, speed):
    drifts = run(tolerance=tolerance, steps=400, speed=speed)
    settled = [drift.error for drift in drifts[4:]]
    assert len(settled) >= 3
    assert all(error <= 1.1 * tolerance for error in settled)
    assert np.median(settled) > 0.5 * tolerance  # no more anchors than it takes


def test_no_interval_is_longer_than_the_longest():
    drifts = run(tolerance=0.5, steps=200, speed=0.001, longest=20)  # nearly linear
    assert [drift.step - drift.since for drift in drifts][:4] == [8, 16, 20, 20]
    assert run(tolerance=0.5, speed=0.001, longest=3)[0].step == 3
    assert run(every=12, longest=3)[0].step == 12  # what was asked for, or can be afforded, stays as it is


def test_no_interval_is_shorter_than_the_shortest():
    """However small the tolerance: rounding does not get less with the interval."""
    drifts = run(tolerance=1e-9, steps=101, shortest=10)
    assert [drift.step for drift in drifts] == list(range(10, 101, 10))
    few = run(tolerance=1e-9, every=4, steps=13, shortest=4)
    assert [drift.step for drift in few] == [4, 8, 12]


def test_nothing_moves_is_no_error():
    assert run(every=5, speed=0.0)[0].error == 0.0


def test_confidence_falls_with_the_margin_and_with_the_error_found():
    behaviour_of = np.array(["a", "a", "b", "b"])
    change = np.array([1.0, -1.0, 5.0, 5.0])
    assert confidence(change, behaviour_of, [], beta=0.1) == {"a": ("high", pytest.approx(0.1)), "b": ("medium", 0.5)}
    assert confidence(change, behaviour_of, [], beta=0.2)["b"] == ("low", 1.0)
    last = Drift(0, 8, 0.2, {"a": 0.7, "b": 0.1})
    assert confidence(change, behaviour_of, [last], beta=0.2) == {"a": ("low", 0.7), "b": ("high", 0.1)}


def test_likely_errors_grow_with_the_change_and_shrink_with_passes():
    changes = [-0.1, 0.2, 0.0]
    few, many = likely_error(changes, 4), likely_error(changes, 5)
    assert few[0] < many[0] < 0 < many[1] < few[1]
    assert likely_error([0.4, 0.2, 0.0], 4) == pytest.approx(tuple(2 * side for side in few))


@given(st.integers(1, 5000), st.integers(1, 256), st.integers(1, 10**5))
def test_passes_stay_cheap_beside_the_run(steps, rows, measured):
    every = affordable_interval(steps, rows, measured)
    passes = len(range(0, steps, every)) if every else 1
    assert passes <= MOST_PASSES
    assert passes == 1 or passes * measured <= LARGEST_COST * steps * rows
    one_more = min(passes + 1, steps)  # there is no room for more of them
    if MOST_PASSES > passes == 1 and steps > 1:
        assert one_more * measured > LARGEST_COST * steps * rows


@given(st.integers(1, 500), st.integers(1, 64), st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_of_free_texts_all_are_measured_or_a_second_pass_is_affordable(steps, rows, sizes):
    measured = affordable_texts(steps * rows, np.array(sizes), once=False)
    reads = sum(min(measured, size) for size in sizes)
    if measured == max(sizes) and reads < LARGEST_COST_OF_ALL * steps * rows:
        return
    if measured == MOST_PAIRS:  # too short a run for two passes over fewer, or just as many
        few = 2 * sum(min(FEWEST_PAIRS, size) for size in sizes)
        assert few > LARGEST_COST * steps * rows or 2 * reads <= LARGEST_COST * steps * rows
        return
    assert FEWEST_PAIRS <= measured <= MOST_TEXTS
    assert affordable_interval(steps, rows, reads) > 0 or steps == 1
    assert max(sizes) > MOST_TEXTS or sum(sizes) >= LARGEST_COST_OF_ALL * steps * rows
