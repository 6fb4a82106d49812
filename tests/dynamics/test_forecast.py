"""The forecast as a whole on a tiny problem: one-token answers, three methods, two behaviours."""

import tracemalloc

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from foretune.dynamics import forecast as module
from foretune.dynamics.closed_form import second_order_weights
from foretune.dynamics.early import early_theory
from foretune.dynamics.flow import gradient_flow
from foretune.dynamics.forecast import ForecastProblem, flow_rows, forecast_run
from foretune.dynamics.head_problem import head_problem
from foretune.dynamics.simulated_run import SimulatedRun
from foretune.models.encoding import EncodedPair
from foretune.models.head import Head
from foretune.objectives import DPO, DiscoPOP
from foretune.statistics.behaviours import yes_no_features

PAIRS, YES, NO = 16, 3, 8


def make_problem(folder, *, alone=True, **changes):
    """Yes/No pairs of one strong and one weak behaviour; the last of each is held out."""
    generator = torch.Generator().manual_seed(0)
    behaviour_of = np.array(["strong", "weak"] * (PAIRS // 2))
    answer = np.arange(PAIRS) // 2 % 2
    side = torch.from_numpy(np.where(answer == 0, 1.0, -1.0) * np.where(behaviour_of == "strong", 2.0, 0.5)).float()
    direction = torch.randn(2, 5, generator=generator)
    states = side[:, None] * direction[torch.arange(PAIRS) % 2] + 0.3 * torch.randn(PAIRS, 5, generator=generator)
    first = np.where(answer == 0, YES, NO).tolist()
    pairs = [EncodedPair(n, "b", "train", 1.0, [1], [ids], [YES + NO - ids], False) for n, ids in enumerate(first)]
    head = head_problem(Head(torch.randn(12, 5, generator=generator), None, 1.0, None), states, pairs)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": PAIRS,
        "num_train_epochs": 10,
        "max_grad_norm": 0.0,
        "report_to": [],
    }
    return ForecastProblem(
        margins=head,
        margins_alone=head if alone else None,
        features=yes_no_features(states.double().numpy(), answer),
        reference_margin=(head.reference[0] - head.reference[1]).double().numpy(),
        pair_id=np.arange(PAIRS),
        behaviour_of=behaviour_of,
        split_of=np.array(["train"] * (PAIRS - 2) + ["test"] * 2),
        weights=np.ones(PAIRS),
        train_pairs=np.arange(PAIRS - 2),
        observed=np.arange(PAIRS),
        objective=DPO(beta=0.3),
        arguments=TrainingArguments(**settings | changes),
        observations=6,
    )


def curve(found, method, behaviour, *, split="train", trained_on="mixture", column="loss"):
    wanted = (method, behaviour, split, trained_on)
    return [
        row[column]
        for row in found.rows
        if (row["method"], row["behaviour"], row["split"], row["trained_on"]) == wanted
    ]


def test_the_three_methods_agree_for_small_full_batch_steps_of_sgd(tmp_path):
    found = forecast_run(make_problem(tmp_path))
    assert (found.steps, found.num_steps) == ([0, 2, 4, 6, 8, 10], 10)
    assert found.order == ["strong", "weak"]
    assert found.margins.shape == (6, PAIRS)
    for trained_on, behaviours in (("mixture", ("strong", "weak", "all")), ("alone", ("strong", "weak"))):
        for behaviour in behaviours:
            for split in ("train", "test"):
                simulated, flow, closed = (
                    curve(found, method, behaviour, split=split, trained_on=trained_on, column="margin")
                    for method in ("simulated_run", "gradient_flow", "second_order")
                )
                assert len(simulated) == 6 and abs(simulated[-1]) > 1e-4
                np.testing.assert_allclose(flow, simulated, rtol=0.05, atol=1e-3)
                np.testing.assert_allclose(closed, simulated, rtol=0.05, atol=1e-3)
    assert {row["behaviour"] for row in found.rows if row["trained_on"] == "alone"} == {"strong", "weak"}


def test_what_a_look_finds_is_part_of_the_mixture_and_of_a_behaviour_alone(tmp_path):
    problem = make_problem(tmp_path)._replace(behaviour_of=np.full(PAIRS, "strong"), features=None)
    without = forecast_run(problem).margins
    others = np.arange(PAIRS) % 3 > 0

    def look(parameters):
        return problem.margins.margins(parameters, torch.arange(PAIRS)).double().numpy() + others

    found = forecast_run(problem._replace(measured=np.flatnonzero(~others), look=look))
    assert found.look.explained == pytest.approx(1)
    np.testing.assert_allclose(found.margins[-1], without[-1] + others, atol=1e-6)
    np.testing.assert_array_equal(found.margins[0], without[0])
    for column in ("loss", "margin"):
        both = [curve(found, "simulated_run", "strong", trained_on=on, column=column) for on in ("mixture", "alone")]
        np.testing.assert_allclose(*both, atol=1e-6)


@pytest.mark.parametrize("looked", [None, np.zeros(PAIRS)], ids=["no look", "a look that is not believed"])
def test_what_a_pilot_has_shown_of_pairs_that_others_stand_for_stays_with_them(looked, tmp_path):
    problem = make_problem(tmp_path, alone=False)
    without = forecast_run(problem).margins
    seen, others = np.linspace(-1, 1, PAIRS), np.arange(PAIRS) % 3 > 0
    past = SimulatedRun([0], seen[None], [], 0)
    measured = np.flatnonzero(~others)
    found = forecast_run(problem._replace(measured=measured, past=past, look=lambda parameters: looked))
    np.testing.assert_allclose(found.margins, without + np.where(others, seen, 0.0), atol=1e-12)


def test_single_behaviours_are_left_out_where_they_are_not_wanted(tmp_path):
    found = forecast_run(make_problem(tmp_path, alone=False))
    assert {row["trained_on"] for row in found.rows} == {"mixture"}


def test_the_clock_stands_still_where_the_learning_rate_is_zero(tmp_path):
    found = forecast_run(
        make_problem(tmp_path, lr_scheduler_type="linear", warmup_steps=3, num_train_epochs=5)._replace(observations=50)
    )
    assert found.learning_rates[0] == 0.0 and found.steps == [0, 1, 2, 3, 4, 5]
    for method in ("simulated_run", "gradient_flow", "second_order"):
        losses = curve(found, method, "all")
        assert losses[1] == pytest.approx(losses[0], abs=1e-7)
        assert losses[-1] < losses[1]


def test_weighted_rows_have_no_second_order_curve(tmp_path):
    problem = make_problem(tmp_path, alone=False)
    weights = np.where(problem.behaviour_of == "weak", 1.9, 0.1)
    found = forecast_run(problem._replace(weights=weights))
    assert {row["method"] for row in found.rows} == {"simulated_run", "gradient_flow"}
    plain = forecast_run(problem)
    for method in ("simulated_run", "gradient_flow"):
        assert curve(found, method, "weak")[-1] < curve(plain, method, "weak")[-1]


def test_a_behaviour_alone_has_weights_of_its_own(tmp_path):
    problem = make_problem(tmp_path)
    heavy = forecast_run(problem._replace(weights=np.where(problem.behaviour_of == "weak", 1.9, 0.1)))
    plain = forecast_run(problem)
    for name in ("strong", "weak"):
        said, expected = (curve(found, "simulated_run", name, trained_on="alone") for found in (heavy, plain))
        np.testing.assert_allclose(said, expected, atol=1e-6)


def test_a_loss_that_bends_down_at_the_start_has_no_second_order_curve(tmp_path):
    found = forecast_run(make_problem(tmp_path, alone=False)._replace(objective=DiscoPOP(beta=0.1)))
    assert {row["method"] for row in found.rows} == {"simulated_run", "gradient_flow"}


def test_a_behaviour_without_weight_is_not_trained_alone(tmp_path):
    problem = make_problem(tmp_path)
    found = forecast_run(problem._replace(weights=np.where(problem.behaviour_of == "weak", 0.0, 2.0)))
    assert {row["behaviour"] for row in found.rows if row["trained_on"] == "alone"} == {"strong"}


def test_a_flow_of_too_many_features_takes_a_share_of_each_behaviour(tmp_path, monkeypatch):
    problem = make_problem(tmp_path, alone=False)
    problem = problem._replace(weights=np.where(problem.behaviour_of == "weak", 1.5, 0.5))
    monkeypatch.setattr(module, "LARGEST_FEATURES", 8 * problem.features.shape[1])
    monkeypatch.setattr("foretune.statistics.behaviours.RARE_ROWS", 1)
    pairs, weights = flow_rows(problem.features, problem, problem.train_pairs)
    assert len(set(pairs.tolist())) == 8
    for name in ("strong", "weak"):
        mine = problem.behaviour_of[pairs] == name
        everyone = problem.behaviour_of[problem.train_pairs] == name
        assert mine.sum() == 4
        assert weights[mine].sum() == pytest.approx(problem.weights[problem.train_pairs][everyone].sum())
    found = forecast_run(problem)
    simulated, flow = (curve(found, method, "strong", column="margin") for method in ("simulated_run", "gradient_flow"))
    assert flow[-1] == pytest.approx(simulated[-1], rel=0.5)


def test_flow_and_closed_forms_need_far_less_memory_than_pairs_squared():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(20_000, 8)) + 0.1
    tracemalloc.start()
    gradient_flow(features, np.ones(20_000), DPO(beta=0.1), times=np.linspace(0, 1, 5))
    second_order_weights(np.linspace(0, 1, 5), features, DPO(beta=0.1))
    early_theory(features, (features[:10_000], features[10_000:]), DPO(beta=0.1), time=1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # one byte a pair of pairs would be 400 MB
