"""Adapters as TRL's flags describe them: names of layers, regular expressions, and those that no layer has."""

import pytest
from tests.conftest import random_llama
from trl import ModelConfig

from foretune.errors import UserError
from foretune.training.build import lora_config


@pytest.fixture(scope="module")
def model():
    return random_llama(40)


def adapted(model, *targets):
    """The layers that the flags put adapters beside."""
    from peft import get_peft_model

    config = lora_config(ModelConfig(lora_target_modules=list(targets)), model)
    try:
        found = get_peft_model(model, config).base_model
        return {name.split(".")[-2] for name, _ in found.named_modules() if name.endswith("lora_A")}
    finally:
        found.unload()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.(up|down)_proj"], {"up_proj", "down_proj"}),
        (["all-linear"], {f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down", "gate")}),
    ],
)
def test_layers_are_named_one_by_one_or_by_an_expression(targets, layers, model):
    assert adapted(model, *targets) == layers


@pytest.mark.parametrize(
    "targets", [["q_prj"], ["q_proj", "query"], ["q_proj|v_proj"], ["self_attn"], ["norm"], ["act_fn"]]
)
def test_layers_that_the_model_does_not_have_are_refused(targets, model):
    said = f"lora_target_modules '{targets[-1]}' names no layers".replace("|", r"\|")
    with pytest.raises(UserError, match=said) as refused:
        lora_config(ModelConfig(lora_target_modules=targets), model)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj." in str(refused.value)


def test_what_is_no_regular_expression_is_refused(model):
    with pytest.raises(UserError, match="is no regular expression"):
        lora_config(ModelConfig(lora_target_modules=["(q_proj"]), model)
    with pytest.raises(UserError, match="PEFT refuses these adapters"):
        lora_config(ModelConfig(lora_task_type="POETRY"), model)


def test_a_wrong_layer_is_refused_before_the_audit(tiny_folder, persona_file, tmp_path, capsys):
    from tests.cli.test_cli import command, run

    flags = command(
        tiny_folder, persona_file, tmp_path / "run", "--trainable", "lora", "--lora_target_modules", "query"
    )
    assert run("forecast", *flags) == 2
    assert "lora_target_modules 'query' names no layers" in capsys.readouterr().err
    assert not (tmp_path / "run" / "record.json").exists()


def test_a_tokenizer_without_padding_and_end_is_refused(tiny_folder, persona_file, tmp_path, capsys):
    import shutil

    from tests.cli.test_cli import command, run
    from transformers import AutoTokenizer

    folder = tmp_path / "endless"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    for verb in ("audit", "reward"):
        flags = command(folder, persona_file, tmp_path / verb)
        flags[flags.index("unembedding")] = "score" if verb == "reward" else "unembedding"
        assert run(verb, *flags) == 2
        assert "has neither a padding nor an end token: set pad_token" in capsys.readouterr().err
