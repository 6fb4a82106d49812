"""Make the trainer that a job describes: what is trainable, the reference, the data, the observer."""

import re
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from foretune.errors import UserError
from foretune.models.head import untie_head

TRAINABLE = ("unembedding", "lora", "full")


def prepare_trainable(model: PreTrainedModel, trainable: str) -> None:
    """Freeze what is not trained; for `unembedding`, untie the output layer. LoRA is left to PEFT."""
    if trainable == "unembedding":
        model.requires_grad_(False)
        untie_head(model)
    elif trainable == "full":
        model.float()  # master weights: bf16 ones would swallow small updates


def lora_config(model_args: ModelConfig, model: PreTrainedModel) -> LoraConfig:
    """The LoRA that TRL's flags describe.

    Where no target modules are named and PEFT knows none for this architecture, all linear layers are taken.

    Raises:
        UserError: adapters that PEFT refuses, or target modules that the model does not have.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    model_args.use_peft = True
    try:
        config: Any = get_peft_config(model_args)
    except ValueError as error:
        raise UserError(f"PEFT refuses these adapters: {error}") from error
    if config.target_modules is None and model.config.model_type not in KNOWN:
        config.target_modules = "all-linear"
    # TRL makes one name a text, which PEFT takes for a regular expression of whole paths
    if isinstance(config.target_modules, str) and re.fullmatch(r"\w[\w.]*", config.target_modules):
        config.target_modules = {config.target_modules}
    if config.target_modules not in (None, "all-linear"):
        _check_targets(config.target_modules, model)
    return config


def _check_targets(targets: str | set[str], model: PreTrainedModel) -> None:
    """Refuse names or a regular expression that match no layer, or one that adapters cannot be laid beside."""
    for target in sorted({targets} if isinstance(targets, str) else targets):
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        try:
            matched = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"lora_target_modules '{target}' is no regular expression: {error}.") from error
        if not matched or not all(map(_adaptable, matched)):
            kinds = (torch.nn.Linear, Conv1D)
            linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, kinds)}
            raise UserError(
                f"lora_target_modules '{target}' names no layers that adapters can be laid beside: the model's linear "
                f"layers are {', '.join(sorted(linear))}."
            )


def _adaptable(module: torch.nn.Module) -> bool:
    """Whether PEFT may know how to adapt a module: one layer with a matrix of weights, quantised or not."""
    if isinstance(module, torch.nn.MultiheadAttention):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not list(module.children()) and any(tensor.ndim > 1 for tensor in own)


def default_device() -> torch.device:
    """Where models run: the accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
