"""The simulated run against an explicit loop that knows nothing of transformers' Trainer."""

import gc

import numpy as np
import pytest
import torch
from tests.reference.unembedding import reference_batches, reference_head_run, reference_margin, reference_schedule
from transformers import TrainingArguments

from foretune.dynamics import head_problem as module
from foretune.dynamics.head_problem import head_problem
from foretune.dynamics.simulated_run import simulate_run
from foretune.features.store import ShardColumn, ShardStore
from foretune.models.encoding import EncodedPair
from foretune.models.head import Head
from foretune.objectives import DPO, IPO, SLiC, simpo
from foretune.scores import Convention

VOCABULARY, DIM, PAIRS = 30, 6, 10


def make_run(seed=0, scale=1.0):
    """A head, states and tokens of ten pairs of one to three tokens, and the same pairs for the reference."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(VOCABULARY, DIM, generator=generator)
    states, encoded, pairs = [], [], []
    for index in range(PAIRS):
        lengths = (1 + index % 3, 1 + (index // 2) % 3)
        shared = torch.randn(DIM, generator=generator)
        tokens = torch.randint(VOCABULARY, (2, 3), generator=generator)
        tokens[1, 0] = (tokens[0, 0] + 1) % VOCABULARY
        pair = []
        states.append(shared)
        for length, ids in zip(lengths, tokens.tolist(), strict=True):
            own = [torch.randn(DIM, generator=generator) for _ in range(length - 1)]
            states += own
            pair += [torch.stack([shared, *own]), ids[:length]]
        pairs.append(tuple(pair))
        encoded.append(EncodedPair(index, "b", "train", 1.0, [1], pair[1], pair[3], False))
    return Head(weight, None, 1.0, None), torch.stack(states), encoded, pairs


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "seed": 3,
        "learning_rate": 0.2,
        "per_device_train_batch_size": PAIRS,
        "num_train_epochs": 4,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "report_to": [],
    }
    return TrainingArguments(**settings | changes)


def simulated(folder, *, made=None, objective=None, train=None, weights=None, observed=None, mass=1.0, **changes):
    head, states, encoded, _ = made or make_run()
    return simulate_run(
        head_problem(head, states, encoded, mass=mass),
        arguments(folder, **changes),
        objective or DPO(beta=0.5),
        train_pairs=range(PAIRS) if train is None else train,
        weights=np.ones(PAIRS) if weights is None else weights,
        observed=range(PAIRS) if observed is None else observed,
        observations=1000,
    )


CASES = {
    "sgd": {},
    "weight decay": {"weight_decay": 0.3},
    "clipping": {"max_grad_norm": 0.05},
    "warm-up and decay": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.01},
    "adamw, all at once": {
        "optim": "adamw_torch",
        "learning_rate": 0.02,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
    },
    "minibatches, last one partial, two epochs": {"per_device_train_batch_size": 4, "num_train_epochs": 2},
    "accumulation, last group partial": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
    },
    "adamw with minibatches and accumulation": {
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_the_run_equals_an_explicit_loop(tmp_path, changes):
    made, objective = make_run(), DPO(beta=0.5)
    weights = np.linspace(0.4, 1.6, PAIRS)
    found = simulated(tmp_path, made=made, objective=objective, weights=weights, **changes)
    used = arguments(tmp_path, **changes)
    steps = reference_batches(
        PAIRS,
        batch_size=used.per_device_train_batch_size,
        accumulation=used.gradient_accumulation_steps,
        epochs=int(used.num_train_epochs),
        seed=used.seed,
    )
    decay = used.lr_scheduler_type == "linear"
    rates = reference_schedule(used.learning_rate, len(steps), warmup=int(used.warmup_steps or 0), decay=decay)
    expected = reference_head_run(
        made[0].weight,
        made[3],
        steps,
        rates,
        objective,
        row_weights=weights,
        optimizer="sgd" if used.optim == "sgd" else "adamw",
        weight_decay=used.weight_decay,
        clip=used.max_grad_norm,
    )
    np.testing.assert_allclose(found.learning_rates, rates, rtol=1e-9, atol=1e-12)
    assert found.steps == list(range(len(steps) + 1))
    assert np.abs(expected[-1]).max() > 0.05
    np.testing.assert_allclose(found.margins, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", [IPO(beta=0.5), SLiC(beta=0.5)], ids=str)
def test_other_objectives_equal_the_explicit_loop(tmp_path, objective):
    made = make_run(1)
    found = simulated(tmp_path, made=made, objective=objective, learning_rate=0.05)
    steps = reference_batches(PAIRS, batch_size=PAIRS, accumulation=1, epochs=4, seed=3)
    rates = [0.05] * 4
    expected = reference_head_run(
        made[0].weight, made[3], steps, rates, objective, row_weights=np.ones(PAIRS), optimizer="sgd"
    )
    np.testing.assert_allclose(found.margins, expected, rtol=1e-3, atol=1e-4)


def test_pairs_that_are_a_part_of_the_data_are_trained_in_their_order(tmp_path):
    made, objective = make_run(2), DPO(beta=0.5)
    train, observed = [7, 1, 4, 9, 2], [0, 1, 7]
    found = simulated(tmp_path, made=made, train=train, observed=observed, per_device_train_batch_size=2)
    steps = reference_batches(5, batch_size=2, accumulation=1, epochs=4, seed=3)
    steps = [[[train[index] for index in batch] for batch in step] for step in steps]
    expected = reference_head_run(
        made[0].weight, made[3], steps, [0.2] * len(steps), objective, row_weights=np.ones(PAIRS), optimizer="sgd"
    )
    np.testing.assert_allclose(found.margins, expected[:, observed], rtol=1e-3, atol=1e-4)


def test_margins_are_zero_at_the_start_and_recorded_at_the_steps_named(tmp_path):
    head, states, encoded, _ = make_run()
    problem = head_problem(head, states, encoded)
    found = simulate_run(
        problem,
        arguments(tmp_path, num_train_epochs=10),
        DPO(beta=0.5),
        train_pairs=range(PAIRS),
        weights=np.ones(PAIRS),
        observed=[3, 5],
        observations=3,
    )
    assert found.steps == [0, 5, 10]
    assert found.margins.shape == (3, 2) and len(found.learning_rates) == 10
    np.testing.assert_allclose(found.margins[0], 0.0, atol=1e-5)
    assert np.abs(found.margins[1]).min() > 1e-3


def test_the_reference_log_probabilities_are_those_of_the_head():
    head, states, encoded, pairs = make_run()
    reference = head_problem(head, states, encoded).reference
    expected = [float(reference_margin(head.weight.double(), pair)) for pair in pairs]
    np.testing.assert_allclose(reference[0] - reference[1], expected, atol=1e-5)


def test_the_head_given_is_not_changed(tmp_path):
    made = make_run()
    before = made[0].weight.clone()
    simulated(tmp_path, made=made)
    assert torch.equal(made[0].weight, before)


def test_fewer_rows_approximate_all_rows(tmp_path):
    made = make_run(4, scale=2.0)
    head, states, encoded, _ = made
    full = simulated(tmp_path, made=made).margins
    errors, rows = [], []
    for mass in (0.5, 0.9, 0.999):
        rows.append(len(head_problem(head, states, encoded, mass=mass).head.weight))
        errors.append(np.abs(simulated(tmp_path, made=made, mass=mass).margins - full).max())
    assert rows == sorted(rows) and rows[0] < VOCABULARY
    assert errors[2] <= errors[0]
    assert errors[1] < 0.05 * np.abs(full).max()


def test_the_rows_left_out_still_count_in_the_normaliser():
    head, states, encoded, _ = make_run(5, scale=2.0)
    whole, part = (head_problem(head, states, encoded, mass=mass) for mass in (1.0, 0.6))
    assert part.rest is not None and len(part.head.weight) < len(whole.head.weight)
    torch.testing.assert_close(part.reference, whole.reference, atol=1e-5, rtol=1e-5)


def test_weights_matter_and_held_out_pairs_do_not(tmp_path):
    train, held_out = range(6), list(range(6, PAIRS))
    made = make_run(6)
    plain = simulated(tmp_path, made=made, train=train)
    weights = np.ones(PAIRS)
    weights[held_out] = 50.0
    np.testing.assert_array_equal(simulated(tmp_path, made=made, train=train, weights=weights).margins, plain.margins)
    seen = simulated(tmp_path, made=made, train=train, observed=train)
    np.testing.assert_allclose(seen.margins, plain.margins[:, :6], atol=1e-5)
    weights[:2] = [3.0, 0.0]
    heavier = simulated(tmp_path, made=made, train=train, weights=weights)
    assert heavier.margins[-1, 0] > plain.margins[-1, 0] + 1e-2


def test_repeated_runs_are_the_same_and_leave_the_arguments_alone(tmp_path):
    used = arguments(tmp_path, per_device_train_batch_size=3, save_strategy="epoch", logging_strategy="steps")
    head, states, encoded, _ = make_run()
    problem = head_problem(head, states, encoded)
    before = used.to_dict()
    runs = [
        simulate_run(
            problem,
            used,
            DPO(beta=0.5),
            train_pairs=range(PAIRS),
            weights=np.ones(PAIRS),
            observed=range(PAIRS),
            observations=4,
        )
        for _ in range(2)
    ]
    np.testing.assert_array_equal(runs[0].margins, runs[1].margins)
    assert used.to_dict() == before
    assert not list(tmp_path.iterdir())


def test_max_steps_wins_over_epochs(tmp_path):
    found = simulated(tmp_path, max_steps=7, per_device_train_batch_size=4)
    assert len(found.learning_rates) == 7 and found.steps[-1] == 7


@pytest.mark.parametrize("mass", [1.0, 0.6])
def test_states_read_from_the_disk_give_the_same_run(tmp_path, monkeypatch, mass):
    head, states, encoded, _ = made = make_run(7, scale=2.0)
    store, first = ShardStore(tmp_path / "features", "key"), [0]
    for index, part in enumerate(states.split(7)):
        store.write(index, {"states": part})
        first.append(first[-1] + len(part))
    monkeypatch.setattr(module, "LARGEST_STATES", 1)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 3)
    column = ShardColumn(store, "states", np.array(first))
    assert head_problem(head, column, encoded).states is column
    settings = {"per_device_train_batch_size": 3, "optim": "adamw_torch", "mass": mass}
    found = simulated(tmp_path, made=(head, column, encoded, None), **settings)
    expected = simulated(tmp_path, made=made, **settings)
    np.testing.assert_allclose(found.margins, expected.margins, atol=1e-5, rtol=1e-5)


def test_the_references_own_margin_as_an_offset_is_a_run_without_a_reference(tmp_path):
    head, states, encoded, _ = make_run()
    convention = Convention(per_token=True)
    problems = [
        head_problem(head, states, encoded, convention=convention._replace(reference=on)) for on in (True, False)
    ]
    own = (problems[0].reference[0] - problems[0].reference[1]).double().numpy()
    runs = [
        simulate_run(
            problem,
            arguments(tmp_path),
            simpo(beta=2.0, gamma=0.5),
            train_pairs=range(PAIRS),
            weights=np.ones(PAIRS),
            observed=range(PAIRS),
            observations=3,
            offsets=offsets,
        )
        for problem, offsets in zip(problems, (own, None), strict=True)
    ]
    assert np.abs(runs[1].margins[-1] - own).max() > 0.05
    np.testing.assert_allclose(runs[0].margins[-1] + own, runs[1].margins[-1], atol=1e-5)
    np.testing.assert_allclose(runs[1].margins[0], own, atol=1e-6)


def test_means_over_tokens_train_as_an_explicit_loop_does(tmp_path):
    """IPO of TRL: each response's log-ratio is divided by its own length."""
    head, states, encoded, pairs = make_run()
    found = simulate_run(
        head_problem(head, states, encoded, convention=Convention(per_token=True)),
        arguments(tmp_path, num_train_epochs=1),
        IPO(beta=0.5),
        train_pairs=range(PAIRS),
        weights=np.ones(PAIRS),
        observed=range(PAIRS),
        observations=2,
    )

    def margins(weight):
        sides = [
            [torch.log_softmax(own @ weight.T, -1)[range(len(ids)), ids].mean() for own, ids in (pair[:2], pair[2:])]
            for pair in pairs
        ]
        return torch.stack([chosen - rejected for chosen, rejected in sides])

    weight = head.weight.clone().requires_grad_()
    start = margins(weight)
    IPO(beta=0.5).torch_value(start - start.detach()).mean().backward()
    with torch.no_grad():
        expected = margins(weight - 0.2 * weight.grad) - start
    np.testing.assert_allclose(found.margins[-1], expected.numpy(), atol=1e-5)


class Linear:
    """Margins linear in one long parameter."""

    sampled, decayed = {}, None

    def __init__(self, features):
        self.features = features

    def start(self):
        return {"weight": torch.zeros(self.features.shape[1])}

    def margins(self, parameters, pairs, *, training=False):
        return self.features[pairs] @ parameters["weight"]


def test_garbage_is_not_searched_for_and_what_waits_for_it_is_small(tmp_path, monkeypatch):
    def simulate():
        everything, settings = np.arange(PAIRS), arguments(tmp_path, optim="adamw_torch")
        return simulate_run(
            problem,
            settings,
            DPO(),
            train_pairs=everything,
            weights=np.ones(PAIRS),
            observed=everything,
            observations=3,
        )

    def numbers():
        """Of all tensors that are alive."""
        tensors = [own for own in gc.get_objects() if isinstance(own, torch.Tensor)]
        return sum({own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in tensors}.values()) / 4

    problem = Linear(torch.randn(PAIRS, 10_000, generator=torch.Generator().manual_seed(0)))
    first = simulate()
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("all objects of the process were searched"))
    gc.disable()
    try:
        before = numbers()
        for _ in range(3):
            again = simulate()
        assert numbers() - before < 1.1 * 10_000  # the last run's end alone, where Adam has three times as many
    finally:
        gc.enable()
    assert torch.equal(first.end["weight"], again.end["weight"]) and first.end["weight"].norm() > 0
