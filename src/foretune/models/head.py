"""The output layer: final hidden states to log-probabilities, for every architecture that transformers has."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class Head(NamedTuple):
    """logits = softcap(scale · (h Wᵀ + b)).

    Attributes:
        weight: W, shape (vocabulary, hidden).
        bias: b, shape (vocabulary,), or None.
        scale: multiplier of the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: Gemma 2's final soft-capping c: logits → c·tanh(logits/c); None for all others.
        numbers: the dtype whose numbers `weight` holds: bfloat16 ones keep being exact in cheaper products.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    numbers: torch.dtype = torch.float32

    def reordered(self, order: Tensor) -> "Head":
        """The same with the vocabulary in another order."""
        return self._replace(weight=self.weight[order], bias=None if self.bias is None else self.bias[order])

    def logits(self, states: Tensor) -> Tensor:
        """Logits in the dtype of `weight`; states (n, hidden) → (n, vocabulary)."""
        return self._capped(torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias))

    def token_logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The logit of one token a state: states (n, hidden), tokens (n,) → (n,)."""
        logits = (states.to(self.weight.dtype) * self.weight[tokens]).sum(-1)
        return self._capped(logits if self.bias is None else logits + self.bias[tokens])

    def slope(self, logits: Tensor) -> Tensor:
        """D logit / d(h Wᵀ + b), of the shape of `logits`."""
        slope = torch.full_like(logits, self.scale)
        return slope if self.softcap is None else slope * (1 - (logits / self.softcap) ** 2)

    def _capped(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (its adapters stay in place), or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its output layer; its `last_hidden_state` is already past the final norm."""
    return causal_model(model).base_model


def head_of(model: torch.nn.Module, *, live: bool = False) -> Head:
    """The model's output layer: detached and in float32, or (`live`) its very parameters, for training."""
    inner = causal_model(model)
    layer = inner.get_output_embeddings()
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0 / scaling if (scaling := getattr(config, "logits_scaling", None)) else 1.0
    weight, bias = layer.weight, getattr(layer, "bias", None)
    numbers = weight.dtype
    if isinstance(weight, DTensor):  # sharded: all processes gather it
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    if not live:
        weight, bias = weight.detach().float(), None if bias is None else bias.detach().float()
    return Head(
        weight,
        bias,
        float(scale),
        getattr(config, "final_logit_softcapping", None),
        numbers,
    )


def untie_head(model: torch.nn.Module) -> None:
    """Give the output layer weights of its own, in float32, so that it can be trained without the embeddings."""
    inner = causal_model(model)
    layer = inner.get_output_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone().float())
    inner.config.get_text_config().tie_word_embeddings = False
    inner.config.tie_word_embeddings = False
