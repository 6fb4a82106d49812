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
from foretune.models.dtype import float32_products_of
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


def test_in_half_precision_the_number_of_workers_changes_nothing(small_batches):
    model, pairs = with_lora("llama").to(torch.bfloat16), make_pairs(0) + make_pairs(1)
    for name, own in model.named_parameters():  # PEFT keeps adapters in float32
        own.data = own.data.float() if "lora" in name else own.data
    compute = gradients_by(model, trainable_names(model))
    found = []
    for count in (1, 3):
        with threads(count):
            found += [GradientPass(model, budget=40 * count)(pairs, compute) for _ in range(5)]
    for part, expected in found[0].items():
        assert all((own[part] - expected).norm() <= 1e-6 * expected.norm() for own in found)


def test_no_worker_sets_the_precision_of_the_others_products(small_batches):
    def precision_inside(view=None, batch=(None,)):
        with float32_products_of(torch.bfloat16):
            return {"bf16": torch.tensor([torch.backends.mkldnn.matmul.fp32_precision == "bf16"] * len(batch))}

    with threads(2):
        found = GradientPass(make_model("llama").to(torch.bfloat16), budget=80)(make_pairs(), precision_inside)
    assert not found["bf16"].any()
    assert precision_inside()["bf16"].all()


def test_pairs_of_the_whole_budget_are_computed_one_after_the_other(monkeypatch):
    workers = []

    def recorded(compute, items, count):
        workers.append(count)
        return [compute(item) for item in items]

    monkeypatch.setattr(gradient_pass, "side_by_side", recorded)
    model = make_model("llama")
    pair = EncodedPair(0, "b", "train", 1.0, [1] * 20, [2, 3], [4], False)
    with threads(4):
        GradientPass(model, budget=30)([pair] * 4, gradients_by(model, trainable_names(model)[-1:]))
    assert workers == [1]
