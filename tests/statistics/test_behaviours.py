"""The rows of behaviours.parquet, the alignment of each pair, and which behaviours have two answers."""

import numpy as np
import pytest

from foretune.records.schema import TABLES
from foretune.statistics.behaviours import (
    Measured,
    alignments,
    behaviour_rows,
    numbered_answers,
    training_kernel,
    yes_no_features,
)
from foretune.statistics.distinguishability import distinguishability, generalised_distinguishability
from foretune.statistics.priority import initial_rates
from foretune.statistics.samples import Differences, TwoClasses

DIM = 4


def measured(generator, yes_no=20, free=16, held_out=6):
    """A Yes/No behaviour and one of free text; the first `held_out` pairs of each are held out."""
    count = yes_no + free
    answer = np.concatenate([np.arange(yes_no) % 2, np.full(free, -1)])
    first = generator.normal(size=(count, DIM)) / 2 + np.where(answer == 0, 1.0, -1.0)[:, None]
    chosen = generator.normal(size=(count, DIM)) / 2 + 1.0
    split = np.full(count, "train", dtype=object)
    split[:held_out] = split[yes_no : yes_no + held_out] = "test"
    sketch = np.where((answer >= 0)[:, None], yes_no_features(first, answer), chosen)
    return Measured(
        np.repeat(["asks", "writes"], [yes_no, free]),
        split.astype(str),
        np.ones(count),
        answer,
        first,
        chosen,
        generator.normal(size=(count, DIM)) / 2,
        sketch,
        sketch,
        np.arange(count),
    )


def test_rows_hold_the_statistics_of_their_own_pairs():
    data = measured(np.random.default_rng(0))
    rows = behaviour_rows(data, training_kernel(data), draws=30, seed=0)
    assert [(row["split"], row["behaviour"], row["num_pairs"]) for row in rows] == [
        ("train", "asks", 14),
        ("train", "writes", 10),
        ("test", "asks", 6),
        ("test", "writes", 6),
    ]
    assert [list(row) for row in rows] == [TABLES["behaviours"].names] * 4
    rates = initial_rates(training_kernel(data))
    for row, part, place in ((rows[0], slice(6, 20), 0), (rows[1], slice(26, 36), 1)):
        sample = (
            TwoClasses(data.first_state[part], data.answer[part] == 0)
            if place == 0
            else Differences(data.chosen_mean[part], data.rejected_mean[part])
        )
        found = distinguishability(sample, draws=30, seed=0)
        assert row["distinguishability"] == found.value
        assert (row["distinguishability_low"], row["distinguishability_high"]) == (found.low, found.high)
        assert (row["permutation_floor"], row["separability"]) == (found.floor, found.separability)
        general = generalised_distinguishability(data.sketch[part], data.answer[part])
        assert (row["generalised_distinguishability"], row["generalised_distinguishability_debiased"]) == general
        assert row["initial_rate"] == rates[place]


def test_priorities_of_shared_answers_are_the_papers():
    generator = np.random.default_rng(4)
    answer, behaviour_of = np.tile([0, 0, 0, 1], 12), np.repeat(["a", "b", "c"], 16)
    shift = np.repeat(generator.normal(size=(3, DIM)), 16, axis=0)
    first = 5.0 + generator.normal(size=(48, DIM)) / 3 + np.where(answer == 0, 1.0, -1.0)[:, None] * shift
    data = Measured(
        behaviour_of,
        np.full(48, "train"),
        np.ones(48),
        answer,
        first,
        first,
        first,
        generator.normal(size=(48, 7)),
        yes_no_features(first, answer),
        np.arange(48),
    )
    # three Yes to each No: the mean of ±x is dominated by the common part of x, Δ = μ₊ − μ₋ is not
    gaps = []
    for name in "abc":
        mine = behaviour_of == name
        gaps.append(first[mine & (answer == 0)].mean(0) - first[mine & (answer == 1)].mean(0))
    average = np.mean(gaps, axis=0)
    rows = behaviour_rows(data, training_kernel(data), draws=5, seed=0)
    np.testing.assert_allclose([row["priority"] for row in rows], gaps @ average / np.linalg.norm(average))
    # a behaviour of one class has no Δ and no part in the others' mean
    data = data._replace(answer=np.where(behaviour_of == "c", 0, answer))
    rows = behaviour_rows(data, training_kernel(data), draws=5, seed=0)
    average = np.mean(gaps[:2], axis=0)
    expected = [*(gaps[:2] @ average / np.linalg.norm(average)), np.nan]
    np.testing.assert_allclose([row["priority"] for row in rows], expected)


def test_one_class_only_gives_a_row_without_distinguishability():
    data = measured(np.random.default_rng(1))
    data = data._replace(answer=np.where(data.answer == 1, 0, data.answer))
    row = behaviour_rows(data, training_kernel(data), draws=30, seed=0)[0]
    undefined = [
        "distinguishability",
        "distinguishability_debiased",
        "distinguishability_low",
        "distinguishability_high",
        "permutation_floor",
        "concentration",
        "trace",
        "separability",
    ]
    assert np.isnan([row[name] for name in undefined]).all()
    assert np.isfinite([row["generalised_distinguishability"], row["initial_rate"], row["priority"]]).all()
    assert np.isnan(alignments(data)[data.behaviour_of == "asks"]).all()


@pytest.mark.parametrize("behaviour", ["asks", "writes"])
def test_a_mislabelled_pair_is_the_least_aligned(behaviour):
    for seed in range(5):
        data = measured(np.random.default_rng(seed), yes_no=40, free=40)
        planted = int(np.flatnonzero((data.behaviour_of == behaviour) & (data.split_of == "train"))[5])
        if behaviour == "asks":
            data.answer[planted] = 1 - data.answer[planted]
        else:
            chosen = data.chosen_mean[planted].copy()
            data.chosen_mean[planted] = data.rejected_mean[planted]
            data.rejected_mean[planted] = chosen
        found = alignments(data)
        members = (data.behaviour_of == behaviour) & (data.split_of == "train")
        assert found[planted] < -0.3
        assert np.flatnonzero(members)[np.argmin(found[members])] == planted


def test_held_out_pairs_are_not_aligned_and_change_nothing():
    data = measured(np.random.default_rng(2))
    found = alignments(data)
    held_out = data.split_of == "test"
    assert np.isnan(found[held_out]).all() and np.isfinite(found[~held_out]).all()
    for part in (data.first_state, data.chosen_mean, data.kernel_features):
        part[held_out] += 100.0
    np.testing.assert_array_equal(alignments(data), found)
    assert np.isfinite(training_kernel(data).matrix).all() and training_kernel(data).matrix.max() < 50


def test_yes_no_features_have_the_kernel_of_the_one_hot_gradients():
    generator = np.random.default_rng(3)
    states, answer = generator.normal(size=(6, DIM)), np.array([0, 1, 0, 1, 1, 0])
    direction = np.where(answer == 0, 1.0, -1.0)
    exact = np.einsum("i,ik,j,jk->ij", direction, states, direction, states) * 2
    features = yes_no_features(states, answer)
    np.testing.assert_allclose(features @ features.T, exact, atol=1e-12)


YES, NO, MAYBE = (5,), (9,), (7,)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(NO, YES), (YES, NO)], [1, 0]),
        ([((5, 2), (9, 2)), ((9, 2), (5, 2))], [0, 1]),
        ([(YES, NO), (YES, MAYBE)], None),
        ([(YES, YES)], None),
        ([((5, 1), (5, 2))], None),
        ([], None),
    ],
)
def test_two_answers_are_found_where_every_pair_offers_them(answers, expected):
    found = numbered_answers(iter(answers))
    assert (None if found is None else found.preferred.tolist()) == expected
