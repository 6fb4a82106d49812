"""Figures of a comparison against values by hand."""

import numpy as np
import pytest

from foretune.verification import MethodRun, compare_methods, order_agreement


def made(method, seed, margins, accuracies):
    """A run in which behaviour k ends with these figures; its start must not matter."""
    rows = [
        {
            "behaviour": f"b{number}",
            "split": "train",
            "step": step,
            "margin": margin * step,
            "reward_accuracy": accuracy if step else 0.0,
            "output_accuracy": 0.5,
            "chosen_displacement": -margin * step,
        }
        for number, (margin, accuracy) in enumerate(zip(margins, accuracies, strict=True))
        for step in (0, 1)
    ]
    spent = {"train": {f"b{number}": 0.1 * number for number in range(len(margins))}}
    return MethodRun(method, seed, [*rows, {**rows[1], "behaviour": "all"}], spent, None)


def test_figures_are_means_over_seeds_of_the_last_step():
    strength = {"b0": 1.0, "b1": 2.0, "b2": 3.0, "b3": 4.0}
    runs = [
        made("linear", 0, [1, 2, 3, 4], [0.5, 0.6, 0.7, 0.9]),
        made("linear", 1, [3, 6, 9, 12], [0.7, 0.8, 0.9, 0.9]),
        made("even", 0, [2, 2, 2, 2], [0.8, 0.8, 0.8, 0.8]),
        made("reverse", 0, [4, 3, 2, 1], [0.8, 0.8, 0.8, 0.8]),
    ]
    linear, even, reverse = compare_methods(runs, strength)
    assert linear["behaviours"]["b2"]["margin"] == pytest.approx(6)
    assert linear["figures"]["reward_accuracy"]["value"] == pytest.approx(0.75)
    assert linear["figures"]["gap"]["value"] == pytest.approx(0.3)
    assert linear["figures"]["dependence"]["value"] == pytest.approx(1)
    assert linear["figures"]["divergence"]["value"] == pytest.approx(0.15)
    assert linear["figures"]["chosen_displacement"]["value"] == pytest.approx(-5)
    assert linear["order"] == ["b3", "b2", "b1", "b0"]
    assert linear["seed_spread"] == pytest.approx(np.std([0.675, 0.825], ddof=1))
    assert even["figures"]["dependence"]["value"] == pytest.approx(0) and even["figures"]["gap"]["value"] == 0
    assert reverse["figures"]["dependence"]["high"] < 0
    assert even["seed_spread"] is None and even["forecast"] is None
    agreement = order_agreement([linear, reverse])
    assert agreement[0][1] == pytest.approx(-1) and agreement[0][0] == pytest.approx(1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Behaviours with margins 1 + slope·(d − mean d) + noise: the slope is known."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        strength = generator.uniform(1, 3, 24)
        margins = 1 + 0.5 * (strength - 2) + 0.1 * generator.normal(size=24)
        values = {f"b{number}": value for number, value in enumerate(strength)}
        (entry,) = compare_methods([made("m", 0, margins, np.full(24, 0.5))], values)
        held += entry["figures"]["dependence"]["low"] < 1.0 < entry["figures"]["dependence"]["high"]
    assert 0.88 < held / 200 < 0.99  # slope 0.5 of means 1 and 2 is a relative slope of 1; 95 % ± 3.2 standard errors
