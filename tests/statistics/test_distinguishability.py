"""Distinguishability: its value, its interval, its floor, and where it is undefined."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ortho_group
from tests.reference.statistics import (
    reference_distinguishability,
    reference_kernel,
    reference_off_diagonal_mean,
    reference_paired_distinguishability,
)

from foretune.statistics.distinguishability import distinguishability, generalised_distinguishability, separability
from foretune.statistics.samples import Differences, TwoClasses, class_alignments

DRAWS = 300


def classes(generator, plus, minus, dim, gap=0.0, spread=1.0):
    """Two Gaussian classes whose means are `gap` apart along a fixed direction."""
    rows = generator.normal(scale=spread, size=(plus + minus, dim))
    rows[:plus] += gap / np.sqrt(dim)
    return TwoClasses(rows, np.arange(plus + minus) < plus)


def paired(generator, count, dim, gap=0.0):
    """Chosen and rejected responses of the same prompts: a common part, and a difference of length `gap`."""
    common = generator.normal(size=(count, dim))
    chosen = common + generator.normal(size=(count, dim)) / 2 + gap / np.sqrt(dim)
    return Differences(chosen, common + generator.normal(size=(count, dim)) / 2)


def band(share, draws=DRAWS):
    """Where 99.9 % of the observed shares lie if the true one is `share`."""
    return [edge / draws for edge in binom.interval(0.999, draws, share)]


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 8), st.integers(2, 8), st.integers(1, 4))
def test_two_classes_equal_the_reference(seed, plus, minus, dim):
    sample = classes(np.random.default_rng(seed), plus, minus, dim, gap=1.5)
    found = distinguishability(sample, draws=5)
    expected = reference_distinguishability(sample.rows[sample.is_plus], sample.rows[~sample.is_plus])
    np.testing.assert_allclose(
        [found.value, found.debiased, found.concentration, found.trace], expected, rtol=1e-7, atol=1e-7
    )


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(4, 9), st.integers(1, 4))
def test_differences_equal_the_reference(seed, count, dim):
    sample = paired(np.random.default_rng(seed), count, dim, gap=1.0)
    found = distinguishability(sample, draws=5)
    expected = reference_paired_distinguishability(sample.chosen, sample.rejected)
    np.testing.assert_allclose([found.value, found.debiased], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [TwoClasses, Differences])
def test_rotating_all_features_changes_nothing(kind):
    generator = np.random.default_rng(1)
    turn = ortho_group.rvs(5, random_state=2)
    if kind is TwoClasses:
        sample = classes(generator, 12, 9, 5, gap=2.0)
        turned = TwoClasses(sample.rows @ turn, sample.is_plus)
    else:
        sample = paired(generator, 15, 5, gap=1.0)
        turned = Differences(sample.chosen @ turn, sample.rejected @ turn)
    np.testing.assert_allclose(distinguishability(turned, draws=50), distinguishability(sample, draws=50), rtol=1e-9)


def test_row_order_does_not_change_the_estimates():
    generator = np.random.default_rng(3)
    two, free = classes(generator, 10, 14, 4, gap=1.0), paired(generator, 12, 4, gap=1.0)
    order, other = generator.permutation(24), generator.permutation(12)
    pairs = [
        (two, TwoClasses(two.rows[order], two.is_plus[order])),
        (free, Differences(free.chosen[other], free.rejected[other])),
    ]
    for sample, shuffled in pairs:
        found, again = distinguishability(sample, draws=20), distinguishability(shuffled, draws=20)
        for figure in ("value", "debiased", "concentration", "trace"):
            np.testing.assert_allclose(getattr(again, figure), getattr(found, figure), rtol=1e-10)


def coverage_of_two_classes(gap):
    generator = np.random.default_rng(4)
    covered = 0
    for seed in range(DRAWS):
        found = distinguishability(classes(generator, 40, 40, 20, gap), draws=200, seed=seed)
        covered += found.low <= gap <= found.high
    return covered / DRAWS


def test_the_interval_covers_the_true_distance_of_two_classes():
    low, high = band(0.95)
    assert low <= coverage_of_two_classes(3.0) <= high


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_the_interval_is_conservative_where_noise_is_as_large_as_the_distance(gap):
    assert coverage_of_two_classes(gap) >= band(0.95)[0]


def test_the_interval_covers_the_true_distance_of_differences():
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(DRAWS):
        found = distinguishability(paired(generator, 60, 10, gap=1.0), draws=200, seed=seed)
        covered += found.low <= 1.0 <= found.high
    low, high = band(0.95)
    assert low <= covered / DRAWS <= high


@pytest.mark.parametrize("draw", [lambda g: classes(g, 20, 30, 8), lambda g: paired(g, 30, 8)])
def test_noise_exceeds_the_permutation_floor_one_time_in_twenty(draw):
    generator = np.random.default_rng(6)
    exceeded = 0
    for seed in range(DRAWS):
        found = distinguishability(draw(generator), draws=200, seed=seed)
        exceeded += found.value > found.floor
    low, high = band(0.05)
    assert low <= exceeded / DRAWS <= high


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda g: classes(g, 5, 11, 10, gap=1.5), 1.5),
        (lambda g: classes(g, 5, 11, 10), 0.0),
        (lambda g: paired(g, 8, 10, gap=0.7), 0.7),
    ],
)
def test_the_debiased_square_is_unbiased(draw, truth):
    generator = np.random.default_rng(7)
    squares = []
    for _ in range(2000):
        sample = draw(generator)
        squares.append(np.sum((sample.coefficients() @ sample.rows) ** 2) - sample.whole().bias)
    error = np.std(squares) / np.sqrt(len(squares))
    assert abs(np.mean(squares) - truth**2) < 4 * error
    assert error < 0.15


def test_separability_is_cohens_d():
    sample = classes(np.random.default_rng(8), 2000, 2000, 5, gap=6.0, spread=2.0)
    assert separability(sample, np.random.default_rng(0)) == pytest.approx(3.0, rel=0.04)


@pytest.mark.parametrize("draw", [lambda g: classes(g, 30, 30, 200), lambda g: paired(g, 60, 200)])
def test_separability_of_noise_is_about_zero_though_rows_are_fewer_than_dimensions(draw):
    found = [separability(draw(np.random.default_rng(seed)), np.random.default_rng(0)) for seed in range(20)]
    assert abs(np.mean(found)) < 0.15


def test_it_is_undefined_where_a_class_has_fewer_than_two_rows():
    rows = np.random.default_rng(9).normal(size=(6, 3))
    for plus in (0, 1, 5, 6):
        assert np.isnan(distinguishability(TwoClasses(rows, np.arange(6) < plus))).all()
    assert np.isnan(distinguishability(Differences(rows[:3], rows[3:]))).all()
    assert np.isfinite(distinguishability(TwoClasses(rows, np.arange(6) < 4), draws=20)[:7]).all()


def test_coefficients_give_the_difference_of_means():
    generator = np.random.default_rng(10)
    sample = classes(generator, 3, 5, 4)
    np.testing.assert_allclose(sample.coefficients() @ sample.rows, sample.rows[:3].mean(0) - sample.rows[3:].mean(0))
    for drawn in (sample.bootstrap(50, generator), sample.permutations(50, generator)):
        np.testing.assert_allclose(np.where(drawn > 0, drawn, 0).sum(1), 1)
        np.testing.assert_allclose(drawn.sum(1), 0, atol=1e-12)
    assert (sample.bootstrap(50, generator)[:, :3] >= 0).all()


def test_halves_are_a_split_with_both_classes():
    sample = classes(np.random.default_rng(11), 5, 4, 2)
    first, second = sample.halves(np.random.default_rng(0))
    assert (first.is_plus.sum(), second.is_plus.sum()) == (3, 2)
    assert ((~first.is_plus).sum(), (~second.is_plus).sum()) == (2, 2)
    together = np.concatenate([first.rows, second.rows])
    np.testing.assert_array_equal(np.sort(together, 0), np.sort(sample.rows, 0))


def test_alignments_of_two_classes_have_their_fixed_points():
    rows = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [-2.0, 5.0], [-2.0, -5.0]])
    found = class_alignments(rows, np.arange(6) < 3)
    np.testing.assert_allclose(found[:4], 1.0)
    moved = rows.copy()
    moved[2] = [0.0, 0.0]
    assert class_alignments(moved, np.arange(6) < 3)[2] == pytest.approx(0.0)
    moved[2] = [-2.0, 0.0]
    assert class_alignments(moved, np.arange(6) < 3)[2] == pytest.approx(-1.0)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 7))
def test_one_stratum_gives_the_mean_of_the_off_diagonal_kernel(seed, count):
    features = np.random.default_rng(seed).normal(size=(count, 3)) + 0.7
    value, debiased = generalised_distinguishability(features, np.zeros(count))
    kernel = reference_kernel(features)
    assert value == pytest.approx(np.sqrt(kernel.mean()))
    assert debiased == pytest.approx(np.sqrt(max(reference_off_diagonal_mean(kernel), 0.0)), abs=1e-6)


def test_strata_remove_a_large_common_mean_from_the_bias():
    # φ = ±x with x = common + noise: the sign is fixed by design, so the common part adds no noise to the mean
    generator = np.random.default_rng(12)
    answer = np.repeat([0, 1], [4, 12])
    sign = np.where(answer == 0, 1.0, -1.0)[:, None]
    true = 8 * (20.0 * (4 - 12) / 16 + 0.6) ** 2
    squares, biases, one_stratum = [], [], []
    for _ in range(1000):
        features = sign * (20.0 + generator.normal(size=(16, 8))) + 0.6
        value, debiased = generalised_distinguishability(features, answer)
        squares.append(debiased**2)
        biases.append(value**2 - debiased**2)
        one_stratum.append(generalised_distinguishability(features, np.zeros(16))[1] ** 2)
    error = np.std(squares) / np.sqrt(len(squares))
    assert abs(np.mean(squares) - true) < 4 * error
    assert abs(np.mean(one_stratum) - true) > 50 * error
    # E‖noise‖² of a mean of 16 rows of 8 unit variances
    assert abs(np.mean(biases) - 8 / 16) < 4 * np.std(biases) / np.sqrt(len(biases))


def test_a_stratum_of_one_row_has_no_debiased_value():
    value, debiased = generalised_distinguishability(np.eye(3), np.array([0, 0, 1]))
    assert value == pytest.approx(np.sqrt(1 / 3))
    assert np.isnan(debiased)
