"""Arguments of a run that is simulated: what is changed in them, and what is refused."""

import copy

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from foretune.errors import UserError


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
    if quiet.optim == OptimizerNames.ADAMW_TORCH:  # the same step in one pass over the weights
        quiet.optim = OptimizerNames.ADAMW_TORCH_FUSED
    return quiet


# Optimisers that move a coordinate by its own gradient alone and keep its state by itself, not rounded in blocks.
COORDINATEWISE = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("paged_adamw_32bit", "ademamix", "paged_ademamix_32bit", "lion_32bit", "paged_lion_32bit"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "sgd", "adagrad"),
}


def check_coordinatewise(arguments: TrainingArguments) -> None:
    """Refuse an optimiser that a sample of the coordinates cannot simulate.

    Raises:
        UserError: it scales or mixes coordinates together.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if name not in COORDINATEWISE:
        raise UserError(
            f"optim {name} does not treat each coordinate by itself, and this forecast knows a sample of them: use "
            "--twin weight_space, which knows them all, or --optim adamw_torch."
        )
