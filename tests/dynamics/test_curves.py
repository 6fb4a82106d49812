"""What margins mean per behaviour and split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.dynamics.curves import curve_rows, learning_order, observation_steps
from foretune.objectives import SLiC

MARGINS = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, -3.0, 2.0, 4.0]])
BEHAVIOUR = np.array(["a", "a", "b", "a"])
SPLIT = np.array(["train", "train", "train", "test"])


def rows(weights=(1.0, 3.0, 1.0, 1.0), **options):
    return curve_rows(
        [0, 7],
        MARGINS,
        BEHAVIOUR,
        SPLIT,
        SLiC(beta=0.5),
        reference_margin=np.array([-2.0, 2.0, -1.0, 0.0]),
        weights=np.array(weights),
        **options,
    )


def one(found, behaviour, split, step):
    (row,) = [row for row in found if (row["behaviour"], row["split"], row["step"]) == (behaviour, split, step)]
    return row


def test_hand_values():
    found = rows()
    assert len(found) == 2 * (3 + 2)
    assert one(found, "a", "train", 7) == {
        "behaviour": "a",
        "split": "train",
        "step": 7,
        "loss": pytest.approx((1 * 0.5 + 3 * 2.5) / 4),
        "reward_accuracy": 0.5,
        "output_accuracy": 0.0,
        "margin": -1.0,
        "num_pairs": 2,
    }
    start = one(found, "all", "train", 0)
    assert (start["loss"], start["reward_accuracy"], start["num_pairs"]) == (1.0, 0.0, 3)
    assert start["output_accuracy"] == pytest.approx(1 / 3)
    end = one(found, "all", "train", 7)
    assert end["loss"] == pytest.approx((0.5 + 3 * 2.5 + 0.0) / 5)
    assert end["output_accuracy"] == pytest.approx(1 / 3)
    assert one(found, "all", "test", 7)["loss"] == one(found, "a", "test", 7)["loss"] == 0.0


def test_rows_of_no_weight_are_averaged_plainly():
    assert one(rows(weights=(0.0, 0.0, 1.0, 0.0)), "a", "train", 7)["loss"] == pytest.approx(1.5)
    assert one(rows(weights=(0.0, 0.0, 1.0, 0.0)), "all", "train", 7)["loss"] == pytest.approx(0.0)


def test_further_columns_are_averaged_over_the_same_pairs():
    found = rows(also={"chosen_displacement": MARGINS * 10})
    assert one(found, "a", "train", 7)["chosen_displacement"] == -10.0
    assert one(found, "all", "test", 0)["chosen_displacement"] == 0.0


def test_learning_order_is_by_the_area_under_the_loss():
    def curve(behaviour, losses, split="train"):
        return [{"behaviour": behaviour, "split": split, "loss": loss} for loss in losses]

    found = curve("late", [0.7, 0.7, 0.1]) + curve("early", [0.7, 0.2, 0.2]) + curve("all", [0.0])
    found += curve("early", [9.0], "test") + curve("tied", [0.5, 0.5, 0.5])
    assert learning_order(found, split="train") == ["early", "late", "tied"]
    assert learning_order(found, split="test") == ["early"]


@given(st.integers(0, 500), st.integers(0, 60))
def test_observation_steps_include_both_ends_once(total, count):
    found = observation_steps(total, count)
    assert (found[0], found[-1]) == (0, total)
    assert found == sorted(set(found))
    assert len(found) == min(max(count, 2), total + 1)
    if len(found) > 2:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1
