"""Margins linear in trainable parameters, whole or sampled, and the run that is simulated on them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from transformers import TrainingArguments

from foretune.dynamics.linearised import Tangent, drop_, whole_weights
from foretune.dynamics.simulated_run import simulate_run
from foretune.errors import UserError
from foretune.features.coordinates import Coordinates
from foretune.objectives import DPO

PAIRS = 6
NAMES = ("layer.weight", "layer.bias", "ln_1.weight")


def tangent(seed=0):
    """Three whole parameters."""
    draw = torch.Generator().manual_seed(seed)
    anchor = {name: torch.randn(shape, generator=draw) for name, shape in zip(NAMES, [(3, 4), (3,), (4,)], strict=True)}
    gradient = torch.randn(PAIRS, 19, generator=draw)
    return Tangent(anchor, torch.randn(PAIRS, generator=draw), gradient, {}, None, np.arange(PAIRS))


def halved(whole):
    """Every other coordinate of a matrix whose coordinates come in pairs that are alike, and that whole matrix."""
    weight, gradient = whole.anchor[NAMES[0]], whole.gradient
    twice = torch.repeat_interleave(gradient[:, :12], 2, 1)
    alike = whole._replace(
        anchor=whole.anchor | {NAMES[0]: torch.repeat_interleave(weight.flatten(), 2).view(6, 4)},
        gradient=torch.cat([twice, gradient[:, 12:]], 1),
    )
    coordinates = Coordinates(torch.arange(0, 24, 2), torch.full((12,), 2.0))
    sample = whole._replace(
        anchor=whole.anchor | {NAMES[0]: weight.flatten()}, sampled={NAMES[0]: coordinates}, gradient=gradient
    )
    return sample, alike


def arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "report_to": [],
        "optim": "adamw_torch",
    }
    return TrainingArguments(**options | changes)


def simulated(problem, folder, **changes):
    return simulate_run(
        problem,
        arguments(folder, **changes),
        DPO(beta=0.5),
        train_pairs=range(PAIRS),
        weights=np.ones(PAIRS),
        observed=range(PAIRS),
        observations=9,
    )


@settings(max_examples=30)
@given(st.integers(0, 1000), st.lists(st.integers(0, PAIRS - 1), min_size=1, max_size=4))
def test_margins_are_linear_and_a_sampled_coordinate_has_a_gradient_of_its_own(seed, pairs):
    problem = halved(tangent(seed))[0]
    draw = torch.Generator().manual_seed(seed + 1)
    parameters = {
        name: (value + torch.randn(value.shape, generator=draw)).requires_grad_(True)
        for name, value in problem.start().items()
    }
    found = problem.margins(parameters, torch.tensor(pairs))
    change = [(parameters[name] - problem.anchor[name]).flatten() for name in NAMES]
    expected = problem.margin[pairs] + problem.gradient[pairs] @ torch.cat([2 * change[0], *change[1:]])
    torch.testing.assert_close(found, expected)
    logsigmoid(found).sum().backward()
    slopes = torch.sigmoid(-found.detach())
    gradient = torch.cat([parameters[name].grad.flatten() for name in NAMES])
    torch.testing.assert_close(gradient, slopes @ problem.gradient[pairs])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.3},
        {"max_grad_norm": 0.05},
        {"optim": "sgd", "max_grad_norm": 0.2, "weight_decay": 0.1},
        {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "warmup_steps": 2},
    ],
    ids=str,
)
def test_a_sample_of_coordinates_that_are_alike_runs_like_all_of_them(tmp_path, changes):
    sample, alike = halved(tangent())
    found, expected = (simulated(problem, tmp_path, **changes).margins for problem in (sample, alike))
    assert np.abs(expected[-1] - expected[0]).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_sample_goes_on_from_the_state_of_all_coordinates(tmp_path):
    """The checkpoint that a real run of the whole parameters leaves behind."""
    sample, alike = halved(tangent())
    draw = torch.Generator().manual_seed(9)
    order = [NAMES[0], NAMES[1], NAMES[2]]
    state = {
        index: {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(alike.anchor[name].shape, generator=draw),
            "exp_avg_sq": torch.rand(alike.anchor[name].shape, generator=draw),
        }
        for index, name in enumerate(order)
    }
    for key in ("exp_avg", "exp_avg_sq"):
        matrix = state[0][key].flatten()
        matrix[1::2] = matrix[::2]
    checkpoints = tmp_path / "checkpoint"
    checkpoints.mkdir()
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in alike.anchor.items()}
    groups = [[parameters[NAMES[0]]], [parameters[name] for name in NAMES[1:]]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(optimizer.state_dict() | {"state": state}, checkpoints / "optimizer.pt")
    torch.save(schedule.state_dict(), checkpoints / "scheduler.pt")
    progress = {"global_step": 3, "max_steps": 8, "epoch": 1.5, "train_batch_size": 4}
    (checkpoints / "trainer_state.json").write_text(
        json.dumps(progress | {"log_history": [], "stateful_callbacks": {}})
    )
    found, expected = (
        simulate_run(
            problem,
            arguments(tmp_path / "out"),
            DPO(beta=0.5),
            train_pairs=range(PAIRS),
            weights=np.ones(PAIRS),
            observed=range(PAIRS),
            observations=9,
            checkpoint=checkpoints,
        )
        for problem in (sample._replace(decayed=[NAMES[0]]), alike._replace(decayed=[NAMES[0]]))
    )
    fresh = simulated(alike, tmp_path / "fresh", max_steps=5).margins
    assert found.steps[0] == 3 and np.abs(expected.margins[-1] - fresh[-1]).max() > 0.05
    np.testing.assert_allclose(found.margins, expected.margins, atol=1e-5)


def factored(seed=0):
    """A matrix, whose gradients have rank 2, and a vector; the same in the tangent form."""
    draw = torch.Generator().manual_seed(seed)
    names = ("layer.weight", "layer.bias")
    anchor = {name: torch.randn(shape, generator=draw) for name, shape in zip(names, [(5, 4), (3,)], strict=True)}
    left, right = (torch.randn(PAIRS, 2, size, generator=draw) for size in (5, 4))
    vectors, margin = torch.randn(PAIRS, 3, generator=draw), torch.randn(PAIRS, generator=draw)
    gradient = torch.cat([(left.transpose(1, 2) @ right).flatten(1), vectors], 1)
    place = np.arange(PAIRS)[::-1].copy()
    return (
        whole_weights(anchor, margin, {names[0]: (left, right)}, vectors, None, place),
        Tangent(anchor, margin, gradient, {}, None, place),
    )


@settings(max_examples=30)
@given(st.integers(0, 1000), st.lists(st.integers(0, PAIRS - 1), min_size=1, max_size=4))
def test_whole_weights_are_the_tangent_form_with_factored_gradients(seed, pairs):
    draw = torch.Generator().manual_seed(seed + 1)
    problems = factored(seed)
    parameters = {name: value + torch.randn(value.shape, generator=draw) for name, value in problems[0].start().items()}
    found = []
    for problem in problems:
        own = {name: value.clone().requires_grad_(True) for name, value in parameters.items()}
        margins = problem.margins(own, torch.tensor(pairs))
        logsigmoid(margins).sum().backward()
        found.append([margins, *(value.grad for value in own.values())])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_run_of_whole_weights_is_that_of_the_tangent_form(tmp_path, optim):
    found, expected = (simulated(problem, tmp_path, optim=optim).margins for problem in factored())
    assert np.abs(expected[-1] - expected[0]).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_names_that_decay_can_be_given(tmp_path):
    by_name, none, first, alike = (
        simulated(tangent()._replace(decayed=names), tmp_path, weight_decay=1.0, learning_rate=0.1).margins
        for names in (None, [], [NAMES[0]], [NAMES[0], NAMES[2]])
    )
    np.testing.assert_array_equal(by_name, alike)
    assert np.abs(none - first).max() > 0.05 and np.abs(by_name - first).max() > 0.05


def test_optimisers_that_mix_coordinates_are_refused_where_some_are_missing(tmp_path):
    sample, alike = halved(tangent())
    with pytest.raises(UserError, match="optim adafactor does not treat each coordinate by itself.*adamw_torch"):
        simulated(sample, tmp_path, optim="adafactor")
    assert np.isfinite(simulated(alike, tmp_path, optim="adafactor").margins).all()


def test_redrawn_weights_spread_as_much_as_a_sample_does():
    draw = torch.Generator().manual_seed(0)
    values, chance = torch.randn(200, generator=draw), 0.2 + 0.8 * torch.rand(200, generator=draw)
    drawn = (torch.rand(4000, 200, generator=draw) < chance).float()
    expected = ((drawn / chance) @ values).std()
    everywhere = Coordinates(torch.arange(200), 1 / chance)
    sample = tangent()._replace(sampled={NAMES[0]: everywhere})
    changes = [sample.redrawn(seed).sampled[NAMES[0]].weight - everywhere.weight for seed in range(2000)]
    # one sample's changes estimate its variance; over all coordinates each counts with the chance of being drawn
    found = (torch.stack(changes) * chance.sqrt() @ values).std()
    assert float(found) == pytest.approx(float(expected), rel=0.05)
    certain = sample._replace(sampled={NAMES[0]: everywhere._replace(weight=torch.ones(200))})
    assert torch.equal(certain.redrawn(1).sampled[NAMES[0]].weight, torch.ones(200))


def test_dropout_loses_its_share_anew_each_time_and_keeps_the_mean():
    torch.manual_seed(0)
    values = torch.rand(400, 1001) + 1
    first, second = values.clone(), values.clone()
    drop_(first, 0.1)
    drop_(second, 0.1)
    noise = 5 / values.numel() ** 0.5
    assert (first == 0).float().mean().item() == pytest.approx(0.1, abs=noise * 0.3)
    assert ((first == 0) & (second == 0)).float().mean().item() == pytest.approx(0.01, abs=noise * 0.1)
    torch.testing.assert_close(first[first != 0], values[first != 0] / 0.9, rtol=2e-3, atol=0)
