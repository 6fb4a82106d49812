"""Verdicts follow from intervals, and statistics tell true claims from false ones where the truth is known."""

import numpy as np
import pytest

from foretune.claims import (
    accuracy,
    collapse,
    displacement,
    equal_rate,
    fine_tuning,
    label_noise,
    last_layer,
    linear_bound,
    loss_rate,
    many_behaviours,
    misalignment,
    priority,
    representations,
    tuning,
    weight_change,
)
from foretune.claims.claim import (
    NOT_SHOWN,
    OPPOSITE,
    SHOWN,
    Check,
    Estimate,
    Evidence,
    NotApplicable,
    above,
    below,
    near,
    never_above,
)
from foretune.claims.intervals import log_slope, mean, over_pairs, spearman
from foretune.claims.study import Study
from foretune.objectives import DPO
from tests.claims.conftest import DIM, ROWS, behaviour, study_of


@pytest.mark.parametrize(
    ("criterion", "interval", "verdict"),
    [
        (above(0.9), (0.91, 0.99), SHOWN),
        (above(0.9), (0.8, 0.99), NOT_SHOWN),
        (above(0.9), (-0.9, -0.1), OPPOSITE),
        (above(0.75, nothing=0.5), (0.1, 0.4), OPPOSITE),
        (above(0.0), (0.0, 0.0), NOT_SHOWN),
        (below(0.0), (-2.0, -1.0), SHOWN),
        (below(0.0), (1.0, 2.0), OPPOSITE),
        (near(2, 0.1), (1.95, 2.05), SHOWN),
        (near(2, 0.1), (1.5, 2.05), NOT_SHOWN),
        (near(2, 0.1), (1.0, 1.5), OPPOSITE),
        (never_above(0.0), (0.0, 0.0), SHOWN),
        (never_above(0.0), (0.1, 0.1), OPPOSITE),
        (above(0.9), (np.nan, np.nan), NOT_SHOWN),
    ],
)
def test_verdicts_follow_from_intervals(criterion, interval, verdict):
    assert criterion.verdict(Estimate(float(np.mean(interval)), *interval)) == verdict


def test_the_weakest_number_decides_and_controls_do_not():
    shown, unclear, opposite = (
        Check("", Estimate.exact(value), near(1, 0.1)) if value != 2 else Check("", Estimate(1, 0.5, 1.5), near(1, 0.1))
        for value in (1, 2, 3)
    )
    control = Check("", Estimate.exact(99))
    assert Evidence([shown, control]).verdict == SHOWN
    assert Evidence([shown, unclear]).verdict == NOT_SHOWN
    assert Evidence([shown, unclear, opposite]).verdict == OPPOSITE


def test_intervals_cover_what_is_known():
    generator = np.random.default_rng(1)
    x = generator.normal(size=30)
    assert spearman(x, -x).high < -0.99
    noise = spearman(x, generator.normal(size=30))
    assert noise.low < 0 < noise.high
    assert mean(np.full(9, 3.0)) == (3, 3, 3)
    assert log_slope(np.exp(x), np.exp(2 * x + 1)).low == pytest.approx(2)
    covered = 0
    for seed in range(100):
        found = mean(np.random.default_rng(seed).normal(size=40))
        covered += found.low < 0 < found.high
    assert 86 <= covered <= 99


def test_pairs_that_share_a_behaviour_are_not_independent():
    generator = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(12) for j in range(i)])
    level = generator.normal(size=12)
    value = level[pairs].sum(1)
    found = over_pairs(lambda drawn: float(value[drawn].mean()), pairs)
    naive = 1.96 * value.std() / np.sqrt(len(value))
    assert found.high - found.low > 2 * naive


def test_claims_that_theory_proves_are_shown_on_orthogonal_behaviours(distinct):
    for module in (weight_change, linear_bound, loss_rate, collapse, priority, equal_rate):
        evidence = module.run(distinct)
        assert evidence.verdict == SHOWN, (module.__name__, [(c.what, c.found, c.verdict) for c in evidence.checks])


def test_frozen_features_are_misaligned_at_one_speed(distinct):
    check, _ = misalignment._frozen(distinct)
    assert check.verdict == SHOWN and check.found.high == pytest.approx(1, abs=1e-9)


def test_the_output_layer_displaces_no_one_token_answer(distinct):
    evidence = displacement.run(distinct)
    assert evidence.verdict == SHOWN and "no data with answers of several tokens" in evidence.notes[0]
    # an answer that is certain already cannot rise; rounding is no fall
    distinct.__dict__["answer_probabilities"] = lambda item: (np.ones(len(item.sign)), np.zeros(len(item.sign)))
    assert displacement.run(distinct).verdict == SHOWN


def life(speed, rows=10):
    """A run in which every margin grows by `speed` a step; only the chosen answers move."""
    log_probs = np.zeros((5, 2, rows)) - 3.0
    log_probs[:, 0] += speed * np.arange(5)[:, None]
    return tuning.Life(np.arange(5.0), log_probs)


def aligned_at(speed, growth=1.0):
    states = np.random.default_rng(0).normal(size=(ROWS, DIM))
    return tuning.Aligned(life(speed), states, growth * states, np.array([[0.0, 2.0], [0.0, 2.0 * growth]]))


@pytest.mark.parametrize(("direction", "verdict"), [(1, SHOWN), (-1, OPPOSITE)])
def test_real_runs_are_judged_by_what_they_did(distinct, monkeypatch, direction, verdict):
    monkeypatch.setattr(tuning, "settings_of", lambda study, trainable: {"β": 0.1})
    monkeypatch.setattr(tuning, "aligned", lambda study, item, trainable: aligned_at(item.distance**direction))
    assert fine_tuning.run(distinct).verdict == verdict
    grown = 1.5**direction
    monkeypatch.setattr(tuning, "aligned", lambda study, item, trainable: aligned_at(1.0, grown))
    assert representations.run(distinct).verdict == verdict
    # flipped labels: the margins of the right ones fall
    lives = life(-1.0), life(-(2.0**direction))
    monkeypatch.setattr(tuning, "misaligned", lambda study, members, trainable: lives)
    found = [check for check in misalignment.run(distinct).checks if check.what.startswith("LoRA")]
    assert found[0].verdict == verdict


def test_losses_of_flipped_labels_are_those_of_negative_margins():
    falling = life(-1.0)
    np.testing.assert_allclose(falling.losses(0.1, flipped=True)[-1], np.log1p(np.exp(-0.4)))
    assert (falling.losses(0.1)[-1] > np.log(2)).all()


def test_label_noise_scales_the_rate(distinct):
    found = [check.found for check in label_noise.run(distinct).checks]
    np.testing.assert_allclose([value for value, *_ in found], [0.64, 0.36, 0.16, 0.04], atol=0.02)


def test_the_initial_rate_is_that_of_theory(distinct):
    item = distinct.behaviours[0]
    expected = 0.01**2 * item.distance**2 / 8
    assert last_layer.initial_rate(item.phi, DPO(beta=0.01)) == pytest.approx(expected, rel=1e-3)


def test_unbalanced_behaviours_can_turn_the_order_of_weight_changes_around(tmp_path):
    axes = np.eye(DIM)
    found = [
        behaviour(f"b{i}", (1 + i) * axes[0], centre=3.0, spread=0.1, seed=i, plus=20, minus=2 + i) for i in range(12)
    ]
    spearman_of_change = weight_change.run(study_of(found, tmp_path)).checks[0]
    assert spearman_of_change.verdict == OPPOSITE


def test_margins_fall_as_one_over_k_only_where_behaviours_are_orthogonal(tmp_path):
    axes = np.eye(DIM)
    apart = [behaviour(f"b{i:02}", 4 * axes[i], seed=i, spread=0.05) for i in range(16)]
    alike = [behaviour(f"b{i:02}", 4 * axes[0], seed=i, spread=0.05) for i in range(16)]
    assert many_behaviours.run(study_of(apart, tmp_path)).checks[0].verdict == SHOWN
    assert many_behaviours.run(study_of(alike, tmp_path)).checks[0].verdict == OPPOSITE


def test_accuracy_rises_with_distance_over_spread(tmp_path):
    axes = np.eye(DIM)
    near_and_far = [behaviour(f"b{i:02}", (0.5 + 0.3 * i) * axes[i], seed=i) for i in range(12)]
    assert accuracy.run(study_of(near_and_far, tmp_path)).checks[2].found.value > 0
    early = [check for check in accuracy.run(study_of(near_and_far, tmp_path)).checks if "Gaussian" in check.what]
    assert early[0].verdict in (SHOWN, NOT_SHOWN) and early[0].found.value < 0.05


def test_too_few_behaviours_are_not_applicable(tmp_path):
    few = study_of([behaviour("one", np.eye(DIM)[0])], tmp_path)
    with pytest.raises(NotApplicable, match="1 such behaviours, this claim needs 8"):
        loss_rate.run(few)


def test_stored_runs_are_not_repeated(distinct, monkeypatch):
    monkeypatch.setattr("foretune.claims.study.features_key", lambda prepared: "key")
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        assert distinct.stored("run", {"a": 1}, compute)["x"].tolist() == [0, 1, 2]
    distinct.stored("run", {"a": 2}, compute)
    assert len(calls) == 2 and isinstance(distinct, Study)
