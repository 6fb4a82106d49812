"""Few measured pairs that stand for many rows, without being learned by heart."""

import numpy as np
import pytest
import torch
from tests.reference.coupled_runs import coupled_runs
from transformers import TrainingArguments

from foretune.dynamics.cross_fitting import CrossFitted
from foretune.dynamics.linearised import Tangent
from foretune.dynamics.simulated_run import simulate_run
from foretune.objectives import DPO

DIM = 300


def problem(features, place):
    """Margins linear in one weight vector that starts at 0."""
    start = {"layer.weight": torch.zeros(features.shape[1])}
    features = torch.as_tensor(features, dtype=torch.float32)
    return Tangent(start, torch.zeros(len(features)), features, {}, None, np.atleast_2d(place))


def arguments(folder, **changes):
    options = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "lr_scheduler_type": "constant"}
    options |= {"optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 4, "num_train_epochs": 3}
    return TrainingArguments(**{**options, **changes})


def simulated(model, folder, observed, **changes):
    count = model.place.shape[1]
    return simulate_run(
        model,
        arguments(folder, **changes),
        DPO(beta=1.0),
        train_pairs=range(count),
        weights=np.ones(count),
        observed=observed,
        observations=2,
    ).margins[-1]


def halved_place(rows, measured):
    """The first `measured` rows are themselves; even ones stand for the others in one half, odd ones in the other."""
    place = np.tile(np.arange(rows), (2, 1))
    for half in (0, 1):
        place[half, measured:] = np.resize(np.arange(half, measured, 2), rows - measured)
    return place


def idiosyncratic(rows, *, shared=0.1, seed=0):
    """Features that have little in common, as those of free text."""
    draw = np.random.default_rng(seed)
    return shared * np.ones(DIM) / np.sqrt(DIM) + draw.standard_normal((rows, DIM)) / np.sqrt(DIM)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_run_equals_two_coupled_ones(tmp_path, max_norm):
    features, place = idiosyncratic(8), halved_place(20, 8)
    changes = {"train_sampling_strategy": "sequential", "max_grad_norm": max_norm or 0.0}
    found = simulated(problem(features, place), tmp_path, range(8), **changes)
    batches = [range(first, first + 4) for _ in range(3) for first in range(0, 20, 4)]
    expected = coupled_runs(features, place, batches, DPO(beta=1.0).slope, learning_rate=0.5, max_norm=max_norm)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stand_ins_do_not_learn_by_heart_what_they_stand_for_often(tmp_path):
    rows, measured = 240, 60
    features = idiosyncratic(rows)
    changes = {"num_train_epochs": 6, "per_device_train_batch_size": 8}
    truth = simulated(problem(features, np.arange(rows)), tmp_path, range(measured), **changes)
    alone = np.concatenate([np.arange(measured), np.resize(np.arange(measured), rows - measured)])
    by_heart = simulated(problem(features[:measured], alone), tmp_path, range(measured), **changes)
    fitted = simulated(problem(features[:measured], halved_place(rows, measured)), tmp_path, range(measured), **changes)
    assert by_heart.mean() > 1.5 * truth.mean()
    assert fitted.mean() == pytest.approx(truth.mean(), rel=0.1)


def test_where_all_is_measured_there_is_one_run(tmp_path):
    features = idiosyncratic(12)
    whole = problem(features, np.arange(12))
    assert [*CrossFitted(whole).start()] == ["layer.weight"]
    # two halves in which nobody stands for anybody are the same run twice
    both = simulated(problem(features, np.tile(np.arange(12), (2, 1))), tmp_path, range(12))
    np.testing.assert_allclose(both, simulated(whole, tmp_path, range(12)), atol=1e-6)


def test_a_pair_is_read_where_it_stands_for_none():
    place = halved_place(6, 4)  # 0 and 2 stand in the first half, 1 and 3 in the second; each but 3 and 2 for one row
    fitted = CrossFitted(problem(np.eye(4), place))
    parameters = {"layer.weight": torch.tensor([1.0, 2, 3, 4]), "other_half.layer.weight": torch.tensor([5.0, 6, 7, 8])}
    assert fitted.observed(parameters, torch.arange(4)).tolist() == [5.0, 2.0, 7.0, 4.0]
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    trained = fitted.trained(leaves, torch.arange(6), 0)
    assert trained.tolist() == [5.0, 2.0, 7.0, 4.0, 5.0, 7.0]
    trained.sum().backward()
    assert leaves["layer.weight"].grad.tolist() == [2.0, 1.0, 2.0, 1.0]
    assert leaves["other_half.layer.weight"].grad is None
    assert fitted.centre(parameters)["layer.weight"].tolist() == [3.0, 4.0, 5.0, 6.0]
