"""Copies of training arguments, with which a run is simulated."""

import copy

from transformers import TrainingArguments


def in_order(arguments: TrainingArguments) -> TrainingArguments:
    """A copy that takes rows in their order, as KTO's trainer does."""
    ordered = copy.copy(arguments)
    ordered.train_sampling_strategy = "sequential"
    return ordered


def quiet_copy(arguments: TrainingArguments, scratch: str) -> TrainingArguments:
    """A copy that computes the same steps but reports, saves and evaluates nothing."""
    quiet = copy.copy(arguments)
    changes = {
        "output_dir": scratch,
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # its name before transformers 5.20
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "push_to_hub": False,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
        "torch_compile": False,
        "fsdp": False,
        "fsdp_plugin_args": None,
        "ddp_find_unused_parameters": False,  # all of W is used, and DDP would not find it in an output that is W
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
    }
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet
