"""A model larger than one device: its parameters are divided over the processes (FSDP2) and gathered layer by layer.

A gathering is a collective: every process must call the model equally often, whatever rows it has. So each call says
that it is made (`processes.sum_over`), and a process that has no rows left keeps the others company with calls on a
dummy row until nobody calls in earnest any more.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from foretune import processes
from foretune.models.head import trunk


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the processes divide the parameters of `model` or of a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def final_states(model: torch.nn.Module, **inputs: Any) -> Tensor:
    """Final hidden states, past the final norm, shape (batch, length, hidden).

    Args:
        model: a causal language model, plain, with PEFT adapters, or sharded by FSDP2.
        inputs: what the model takes, without labels.
    """
    if not isinstance(model, FSDPModule):
        return trunk(model)(**inputs, use_cache=False).last_hidden_state
    processes.sum_over(1)
    return _through_root(model, inputs)


def keep_company(model: torch.nn.Module) -> None:
    """Call a sharded model on a dummy row as long as another process still calls `final_states` on rows of its own."""
    if isinstance(model, FSDPModule):
        dummy = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        while processes.sum_over(0):
            _through_root(model, {"input_ids": dummy})


def whole(tensor: Tensor) -> Tensor:
    """A parameter with all its shards; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _through_root(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The trunk called inside the root's hooks, which gather the parameters that belong to no inner unit."""
    if not hasattr(model, "_final_states"):
        model._final_states = MethodType(lambda self, **given: trunk(self)(**given).last_hidden_state, model)
        register_fsdp_forward_method(model, "_final_states")
    return model._final_states(**inputs, use_cache=False)
