"""Pair gradients of every architecture agree with one autograd pass a pair, in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.conformance.test_architectures import CONFIGS, make_model, make_pairs
from tests.reference.pair_gradients import pair_gradients
from torch.overrides import TorchFunctionMode

from foretune.errors import UserError
from foretune.features.pair_gradients import batch_gradients, trainable_names
from foretune.models.batches import supports_packing

TOLERANCE = 1e-6


class AllFloat64(TorchFunctionMode):
    """Float64 also where transformers goes through float32: norms, rotary embeddings, softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def all_float64():
    with AllFloat64():
        yield


def exact_model(name: str) -> torch.nn.Module:
    model = make_model(name).double()
    model.config._experts_implementation = "eager"
    return model


def with_lora(model: torch.nn.Module, **options) -> torch.nn.Module:
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": "all-linear"} | options
    model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def assert_agrees(model: torch.nn.Module, names: list[str], *, packings: set[bool] | None = None) -> None:
    pairs = make_pairs()
    expected = pair_gradients(model, pairs, names)
    for packed in packings or {False, supports_packing(model)}:
        found = batch_gradients(model, pairs, names, packed=packed, dtype=torch.float64).gradient
        assert list(found) == names
        for name in names:
            error = (found[name] - expected[name]).norm() / expected[name].norm()
            assert error <= TOLERANCE, f"{name}, packed={packed}: {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_lora(name):
    targets = ["q_proj", "o_proj"] if name == "mixtral" else "all-linear"
    model = with_lora(exact_model(name), use_rslora=True, target_modules=targets)
    assert_agrees(model, trainable_names(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_all_parameters(name):
    model = exact_model(name)
    names = [own for own in trainable_names(model) if not (name == "mixtral" and ".mlp." in own)]
    assert_agrees(model, names, packings={supports_packing(model)})


@pytest.mark.parametrize("name", CONFIGS)
def test_sampled_coordinates_are_those_of_whole_gradients(name):
    model, pairs = exact_model(name), make_pairs()
    names = [own for own in trainable_names(model) if not (name == "mixtral" and ".mlp." in own)]
    expected = pair_gradients(model, pairs, names)
    sampled = {
        own: torch.randperm(expected[own].shape[1], generator=torch.Generator().manual_seed(3))[:40].sort().values
        for own in names[:-2]
    }
    found = batch_gradients(model, pairs, names, sampled=sampled, dtype=torch.float64).gradient
    for own in names:
        chosen = expected[own][:, sampled[own]] if own in sampled else expected[own]
        assert (found[own] - chosen).norm() <= TOLERANCE * expected[own].norm(), own


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_padding_token_of_embeddings_is_not_trained(name, sampled):
    model, pairs = exact_model(name), make_pairs()
    layer = model.get_input_embeddings()
    layer.padding_idx = pairs[0].prompt_ids[0]
    owned = next(own for own, parameter in model.named_parameters() if parameter is layer.weight)
    every = {owned: torch.arange(layer.weight.numel())} if sampled else {}
    found = batch_gradients(model, pairs, [owned], sampled=every, dtype=torch.float64).gradient[owned]
    expected = pair_gradients(model, pairs, [owned])[owned]
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def test_dora():
    model = with_lora(exact_model("qwen2"), use_dora=True)
    names = trainable_names(model)
    assert any("lora_magnitude_vector" in name for name in names)
    assert_agrees(model, names)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_training_mode(reentrant):
    model = with_lora(exact_model("llama"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    names = trainable_names(model)
    expected = pair_gradients(model, make_pairs(), names)
    model.train()
    found = batch_gradients(model, make_pairs(), names, dtype=torch.float64).gradient
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
    assert model.training and trainable_names(model) == names


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama"])
def test_tied_and_untied_unembedding(name):
    model = exact_model(name)
    embedding = next(own for own, _ in model.named_parameters() if "embed" in own or "wte" in own)
    if name != "llama":
        assert model.get_output_embeddings().weight is model.get_parameter(embedding)
        assert_agrees(model, [embedding])
    else:
        assert_agrees(model, ["lm_head.weight"])
        assert_agrees(model, [embedding, "lm_head.weight"])


def test_experts_are_refused_by_name():
    model = exact_model("mixtral")
    experts = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(UserError, match=rf"'{experts}'.*MixtralExperts.*leave it out"):
        batch_gradients(model, make_pairs(), [experts])


def test_adapters_of_embeddings_are_refused():
    model = with_lora(exact_model("qwen2"), target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="lora_embedding_A.*leave it out"):
        batch_gradients(model, make_pairs(), trainable_names(model))


def test_unknown_and_missing_names_are_refused():
    model = exact_model("qwen2")
    with pytest.raises(UserError, match="no parameter 'head'"):
        batch_gradients(model, make_pairs(), ["head"])
    with pytest.raises(UserError, match="no parameter to take gradients of"):
        batch_gradients(model, make_pairs(), [])
