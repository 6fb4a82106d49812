"""Figures of a verification on rows made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, spearmanr

from foretune.errors import UserError
from foretune.verification.compare import FIGURES, compare, margin_fit, spearman

NAMES = [f"behaviour-{letter}" for letter in "abcdefgh"]
STEPS = [0, 5, 10]
START = 0.7


def curves(ends, accuracies=None, *, steps=STEPS, split="train", **extra):
    """Losses that move linearly from the start to each behaviour's end."""
    accuracies = accuracies or {name: 1 - end for name, end in ends.items()}
    rows = []
    for name, end in ends.items():
        for step in steps:
            done = step / STEPS[-1]
            rows.append(
                {
                    "behaviour": name,
                    "split": split,
                    "step": step,
                    "loss": START + done * (end - START),
                    "reward_accuracy": done * accuracies[name],
                }
                | extra
            )
    return rows


def forecast_curves(*args, **options):
    return curves(*args, method="simulated_run", trained_on="mixture", **options)


def margins(ends, *, per_behaviour=3, steps=STEPS, noise=0.0, factor=1.0, seed=0):
    """Margins of three pairs a behaviour; the lower its loss, the larger."""
    generator = np.random.default_rng(seed)
    final = np.repeat([START - end for end in ends.values()], per_behaviour) * np.tile([0.5, 1.0, 2.0], len(ends))
    final = factor * final + noise * generator.normal(size=len(final))
    pair_id = 100 + np.arange(len(final))
    return {"pair_id": pair_id, "steps": np.array(steps), "margins": np.outer(np.array(steps) / STEPS[-1], final)}


def owners(ends):
    return {100 + 3 * index + place: name for index, name in enumerate(ends) for place in range(3)}


def verified(said, happened, *, draws=100, **options):
    return compare(
        forecast_curves(said),
        curves(happened),
        margins(said),
        margins(happened),
        owners(said),
        draws=draws,
        **options,
    )


RISING = {name: 0.1 + 0.05 * index for index, name in enumerate(NAMES)}


def test_a_perfect_forecast():
    found = verified(RISING, RISING, caveats=["Adam."])
    assert (found.spearman_loss, found.spearman_accuracy) == (1.0, 1.0)
    assert found.margin_r2 == pytest.approx(1)
    assert found.margin_slope == pytest.approx(1)
    assert found.loss_mae == found.relative_loss_error == 0.0
    assert (found.split, found.step, found.num_behaviours, found.num_pairs) == ("train", 10, 8, 24)
    assert [row["step"] for row in found.over_run] == [5, 10]
    assert found.sentence == "The forecast was right in direction, order and size."
    assert found.caveats == ["Adam."]
    assert [(row["behaviour"], row["forecast_rank"], row["observed_rank"]) for row in found.behaviours] == [
        (name, rank, rank) for rank, name in enumerate(NAMES, 1)
    ]


def test_a_reversed_forecast():
    reverse = dict(zip(NAMES, list(RISING.values())[::-1], strict=True))
    found = verified(RISING, reverse)
    assert (found.spearman_loss, found.spearman_accuracy) == (-1.0, -1.0)
    assert found.sentence.startswith("The forecast was wrong here: ")


def test_errors_of_a_forecast_that_promises_twice_the_change():
    happened = {name: START - (START - end) / 2 for name, end in RISING.items()}
    found = verified(RISING, happened)
    changes = [START - end for end in happened.values()]
    # off by the whole observed change at the last step, by half of it at the middle one
    assert found.loss_mae == pytest.approx(np.mean(changes) * 0.75)
    assert found.relative_loss_error == pytest.approx(0.75)
    assert found.margin_slope == pytest.approx(0.5)
    assert found.margin_r2 == pytest.approx(1)
    assert "margins moved 0.5 times as far as forecast" in found.sentence


def test_the_sentence_names_the_behaviour_that_was_misplaced_most():
    happened = dict(RISING) | {NAMES[0]: 0.55}
    found = verified(RISING, happened)
    assert f"{NAMES[0]} was learned later than forecast (rank 8 instead of 1 of 8)" in found.sentence
    found = verified(happened, RISING)
    assert f"{NAMES[0]} was learned earlier than forecast (rank 1 instead of 8 of 8)" in found.sentence


def test_the_sentence_names_behaviours_that_went_the_other_way():
    found = verified(RISING, dict(RISING) | {NAMES[7]: 0.9, NAMES[6]: 0.8})
    assert f"the direction was wrong for {NAMES[6]}, {NAMES[7]}" in found.sentence
    found = verified(RISING, {name: 0.9 for name in NAMES})
    assert "and 3 more" in found.sentence


@pytest.mark.parametrize(("reach", "is_wrong"), [(0.02, False), (0.005, True)])
def test_a_band_that_reaches_beyond_the_start_says_no_direction(reach, is_wrong):
    said = dict(RISING) | {NAMES[7]: START + 0.01}
    rows = [row | {"loss_low": row["loss"] - reach, "loss_high": row["loss"] + reach} for row in forecast_curves(said)]
    happened = dict(RISING) | {NAMES[7]: START - 0.01}
    found = compare(rows, curves(happened), margins(said), margins(happened), owners(said), draws=5)
    assert (f"the direction was wrong for {NAMES[7]}" in found.sentence) == is_wrong


def test_only_the_joint_simulated_run_of_the_split_is_compared():
    rows = forecast_curves(RISING)
    other = {name: 5.0 for name in NAMES}
    rows += curves(other, method="gradient_flow", trained_on="mixture")
    rows += curves(other, method="simulated_run", trained_on="alone")
    rows += forecast_curves(other, split="test") + forecast_curves({"all": 3.0})
    observed = curves(RISING) + curves({"all": 9.0}) + curves(other, split="test")
    found = compare(rows, observed, margins(RISING), margins(RISING), owners(RISING), draws=5)
    assert (found.spearman_loss, found.loss_mae, found.num_behaviours) == (1.0, 0.0, 8)
    tested = compare(rows, observed, margins(RISING), margins(RISING), owners(RISING), split="test", draws=5)
    assert tested.loss_mae == 0.0 and tested.split == "test"


def test_the_last_common_step_and_the_common_behaviours_are_compared():
    some = {name: RISING[name] for name in NAMES[:5]}
    found = compare(
        forecast_curves(RISING),
        curves(some, steps=[0, 5]),
        margins(RISING),
        margins(RISING, steps=[0, 5]),
        owners(RISING),
        draws=5,
    )
    assert (found.step, found.num_behaviours) == (5, 5)


def test_pairs_are_matched_by_their_ids():
    observed = margins(RISING)
    order = np.random.default_rng(1).permutation(24)[:20]
    observed = observed | {"pair_id": observed["pair_id"][order], "margins": observed["margins"][:, order]}
    found = compare(forecast_curves(RISING), curves(RISING), margins(RISING), observed, owners(RISING), draws=5)
    assert found.num_pairs == 20
    assert found.margin_r2 == pytest.approx(1)
    few = {pair: name for pair, name in owners(RISING).items() if name != NAMES[0]}
    found = compare(forecast_curves(RISING), curves(RISING), margins(RISING), observed, few, draws=5)
    assert found.num_pairs == sum(pair in few for pair in observed["pair_id"])


def test_nothing_in_common_is_a_mistake_of_the_user():
    later = margins(RISING, steps=[0, 7])
    with pytest.raises(UserError, match="no step in common"):
        compare(forecast_curves(RISING), curves(RISING, steps=[0, 7]), margins(RISING), later, owners(RISING))
    with pytest.raises(UserError, match="no step in common"):
        compare(forecast_curves(RISING), curves({"x": 0.1}), margins(RISING), margins(RISING), owners(RISING))
    with pytest.raises(UserError, match="no step in common"):
        compare([], curves(RISING), margins(RISING), margins(RISING), owners(RISING))
    foreign = margins(RISING) | {"pair_id": np.arange(24)}
    with pytest.raises(UserError, match="no pair in common"):
        compare(forecast_curves(RISING), curves(RISING), margins(RISING), foreign, owners(RISING))


def test_a_split_without_rows_is_told():
    with pytest.raises(UserError, match="no rows of split 'test': compare the other split, or hold rows out"):
        verified(RISING, RISING, split="test")


def test_two_behaviours_have_no_rank_correlation_but_all_the_rest():
    two = {name: RISING[name] for name in NAMES[:2]}
    with np.errstate(all="raise"):
        found = verified(two, two)
    assert np.isnan([found.spearman_loss, found.spearman_accuracy, *found.intervals["spearman_loss"]]).all()
    assert found.margin_r2 == pytest.approx(1)
    assert np.isfinite(found.intervals["margin_slope"]).all()
    assert found.relative_loss_error == 0.0


def test_a_run_that_changed_nothing_has_no_relative_error():
    still = {name: START for name in NAMES}
    found = verified(RISING, still)
    assert np.isnan([found.relative_loss_error, found.spearman_loss, found.margin_r2]).all()
    assert found.loss_mae > 0


@pytest.mark.parametrize("seed", range(5))
def test_intervals_contain_the_estimate_and_are_reproducible(seed):
    generator = np.random.default_rng(seed)
    happened = {name: end + 0.05 * generator.normal() for name, end in RISING.items()}
    given_rows = (
        forecast_curves(RISING),
        curves(happened, {name: generator.uniform() for name in NAMES}),
        margins(RISING),
        margins(RISING, noise=0.2, factor=1.3, seed=seed),
        owners(RISING),
    )
    found = compare(*given_rows, draws=300, seed=seed)
    for figure in FIGURES:
        low, high = found.intervals[figure]
        assert low <= getattr(found, figure) <= high
    assert np.diff(found.intervals["margin_slope"])[0] > 0.01
    assert compare(*given_rows, draws=300, seed=seed).intervals == found.intervals


def test_as_json_spells_the_intervals_out():
    content = verified(RISING, RISING).as_json()
    assert "intervals" not in content
    for figure in FIGURES:
        assert content[f"{figure}_low"] <= content[figure] + 1e-9
        assert content[f"{figure}_high"] >= content[figure] - 1e-9


VALUES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12)


@given(VALUES)
def test_spearman_equals_scipy_with_ties(values):
    left, right = (list(map(float, side)) for side in zip(*values, strict=True))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert np.isnan(spearman(left, right))
    else:
        assert spearman(left, right) == pytest.approx(spearmanr(left, right).statistic, abs=1e-9)


def test_spearman_of_fewer_than_three_values_is_undefined():
    assert np.isnan([spearman([], []), spearman([1.0], [2.0]), spearman([1.0, 2.0], [1.0, 2.0])]).all()


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(3, 20), st.floats(-3, 3))
def test_margin_fit_equals_linear_regression(seed, count, slope):
    generator = np.random.default_rng(seed)
    forecast = generator.normal(size=count)
    observed = slope * forecast + generator.normal(size=count) + 5
    expected = linregress(forecast, observed)
    np.testing.assert_allclose(margin_fit(forecast, observed), (expected.rvalue**2, expected.slope), atol=1e-9)


def test_margin_fit_of_a_constant_side_is_undefined():
    assert np.isnan(margin_fit(np.zeros(3), np.arange(3.0))).all()
    assert np.isnan(margin_fit(np.arange(3.0), np.full(3, 0.25))).all()
