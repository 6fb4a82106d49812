"""Make the trainer that a job describes: what is trainable, the reference, the data, the observer."""

from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

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
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    model_args.use_peft = True
    config: Any = get_peft_config(model_args)
    if config.target_modules is None and model.config.model_type not in KNOWN:
        config.target_modules = "all-linear"
    return config


def default_device() -> torch.device:
    """Where models run: the accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
