"""The early theory's figures are those of its parts, and hypotheses that fail on the data are said."""

import numpy as np
import pytest

from foretune.data.synthetic import symmetric_behaviour
from foretune.dynamics.accuracy import EarlyAccuracy
from foretune.dynamics.bounds import largest_curvature, loss_drop_floor, weight_change_bound
from foretune.dynamics.early import early_theory
from foretune.objectives import DPO, SLiC
from foretune.statistics.tails import tail_index

CENTRED = symmetric_behaviour(np.array([1.5, 0.0, 0.0]))


def theory(behaviour=CENTRED, *, yes=300, no=300, objective=None, time=0.1, **options):
    sample = behaviour.yes_no(yes, no, np.random.default_rng(0))
    classes = sample.states[sample.is_plus], sample.states[~sample.is_plus]
    return early_theory(sample.features, classes, objective or DPO(beta=0.1), time=time, **options)


def test_data_that_meet_all_hypotheses_are_told_nothing():
    found = theory(learning_rate=0.1)
    assert found.holds, found.failed
    sample = CENTRED.yes_no(300, 300, np.random.default_rng(0))
    norm = np.linalg.norm(sample.features.mean(0))
    curvature = largest_curvature(sample.features, DPO(beta=0.1))
    value = found.value
    assert value["weight_change_bound"] == weight_change_bound(np.array(0.1), norm, DPO(beta=0.1))
    assert value["loss_drop_floor"] == loss_drop_floor(np.array(0.1), norm, curvature, DPO(beta=0.1))
    assert value["loss_drop_floor"] < value["loss_drop_bound"]
    sides = sample.states[sample.is_plus], sample.states[~sample.is_plus]
    accuracy = EarlyAccuracy.of_classes(*sides)
    assert (value["early_accuracy"], value["guaranteed_accuracy"]) == (accuracy.gaussian(), accuracy.guaranteed())
    gap = sides[0].mean(0) - sides[1].mean(0)
    tails = [tail_index(side @ gap / np.linalg.norm(gap)).value for side in sides]
    assert value["tail_index"] == pytest.approx(min(tail.alpha for tail in tails))
    assert value["tail_norm"] == pytest.approx(max(tail.norm for tail in tails))
    bound = accuracy.subexponential(alphas=[tail.alpha for tail in tails], norms=[tail.norm for tail in tails])
    assert value["subexponential_accuracy"] == pytest.approx(bound)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"yes": 540, "no": 60}, "classes are unbalanced: 90% prefer one answer"),
        ({"learning_rate": 1e4}, "the step is too large"),
        ({"time": 1e6}, "growth is no longer linear"),
        ({"behaviour": symmetric_behaviour(np.array([1.5, 0.0]), offset=np.array([4.0, 0.0]))}, "are not centred"),
        ({"objective": SLiC(beta=0.1)}, "largest curvature elsewhere"),
        ({"yes": 20, "no": 20}, "a tail index needs more than 20 values"),
    ],
)
def test_a_hypothesis_that_fails_is_said(options, words):
    found = theory(**options)
    assert [failed for failed in found.failed if words in failed], found.failed


def test_states_without_spread_have_no_tails_and_figures_stay_finite():
    states = np.tile([[1.0, 0.0]], (60, 1))
    sides = states[:30], -states[:30]
    found = early_theory(np.sqrt(2) * states, sides, DPO(beta=0.1), time=1.0)
    assert "tail_index" not in found.value and np.isfinite(list(found.value.values())).all()
    assert sum("no spread" in failed for failed in found.failed) == 2


def test_free_text_has_no_accuracies():
    sample = CENTRED.yes_no(50, 50, np.random.default_rng(1))
    found = early_theory(sample.features, None, DPO(beta=0.1), time=0.1)
    assert found.holds and not [name for name in found.value if "accuracy" in name]
