"""Batches side by side give each pair the gradients that it has alone, and leave the model as it was."""

import threading

import pytest
import torch
from tests.conformance.test_architectures import CONFIGS, make_model, make_pairs
from tests.conftest import threads
from tests.features.test_token_factors import with_lora

from foretune.features import gradient_pass
from foretune.features.gradient_pass import GradientPass
from foretune.features.pair_gradients import batch_gradients, trainable_names
from foretune.models.encoding import EncodedPair


def gradients_by(model, names):
    def compute(view, batch):
        found = batch_gradients(view, batch, names)
        return {"margin": found.margin, "gradient": torch.cat(list(found.gradient.values()), 1)}

    return compute


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("foretune.models.batches.LEAST_BUDGET", 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_three_workers_find_what_each_pair_has_alone(name, small_batches):
    targets = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    model, pairs = with_lora(name, **targets), make_pairs(0) + make_pairs(1)
    names = trainable_names(model)
    compute = gradients_by(model, names)
    with threads(3):
        found = GradientPass(model, budget=120)(pairs, compute)
    alone = [compute(model, [pair]) for pair in pairs]
    for part, own in found.items():
        expected = torch.cat([one[part] for one in alone])
        assert (own - expected).norm() <= 1e-4 * expected.norm()


def test_workers_overlap_on_views_of_one_model_that_is_left_as_it_was(small_batches):
    model, pairs = with_lora("llama").train(), make_pairs()[::-1]
    before = {name: own.clone() for name, own in model.named_parameters()}
    together, views = threading.Barrier(2, timeout=30), set()

    def compute(view, batch):
        together.wait()
        assert not view.training and not any(own.requires_grad for own in view.parameters())
        views.add(view)
        return {"place": torch.tensor([pair.pair_id for pair in batch])}

    with threads(2):
        run = GradientPass(model, budget=2 * 40)
        found = [run(pairs[:2], compute)["place"] for _ in range(3)]
    assert all(places.tolist() == [4, 3] for places in found)
    assert len(views) == 2 and model in views
    storages = {own.data_ptr() for own in model.parameters()}
    assert all(own.data_ptr() in storages for view in views for own in view.parameters())
    assert model.training and all(own.requires_grad == ("lora" in name) for name, own in model.named_parameters())
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 2048), (torch.float32, 30)])
def test_half_precision_and_pairs_of_the_whole_budget_are_computed_one_after_the_other(dtype, budget, monkeypatch):
    workers = []

    def recorded(compute, items, count):
        workers.append(count)
        return [compute(item) for item in items]

    monkeypatch.setattr(gradient_pass, "side_by_side", recorded)
    model = make_model("llama").to(dtype)
    pair = EncodedPair(0, "b", "train", 1.0, [1] * 20, [2, 3], [4], False)
    with threads(4):
        GradientPass(model, budget=budget)([pair] * 4, gradients_by(model, trainable_names(model)[-1:]))
    assert workers == [1]
