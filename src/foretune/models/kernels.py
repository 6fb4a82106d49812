"""Faster CPU kernels for frozen models, behind the functions that every architecture calls.

- float32 linear layers go through oneDNN where that is measurably faster than PyTorch's BLAS: on AMD processors MKL
  reaches less than half of it.
- Half-precision attention under a mask is plain batched matrix products, whose backward recomputes the probabilities;
  PyTorch's fused CPU kernel takes two to three times as long up to some hundreds of tokens.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Below this many weights a layer is not worth a detour.
SMALL = 1 << 12
# A gain smaller than this is not worth it either.
WORTHWHILE_SPEED_UP = 1.2


class FrozenKernels(TorchFunctionMode):
    """Within this context, frozen linear layers and masked attention on a CPU run on the fastest kernels there are."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and _suits_onednn(*args):
            return _OneDnnLinear.apply(*args, *[None] * (3 - len(args)))
        if func is functional.scaled_dot_product_attention and _suits_products(*args, **kwargs):
            query, key, value = args
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            return _ProductAttention.apply(query, key, value, kwargs["attn_mask"], scale)
        return func(*args, **kwargs)


def _suits_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    plain = all(part.device.type == "cpu" and part.dtype == torch.float32 for part in (inputs, weight))
    plain = plain and not torch.is_autocast_enabled("cpu")
    return (
        plain
        and not (weight.requires_grad and torch.is_grad_enabled())
        and weight.numel() >= SMALL
        and onednn_is_faster()
    )


def _suits_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return half and attn_mask is not None and attn_mask.dtype == query.dtype and not (dropout_p or enable_gqa)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether a float32 product of ordinary size is faster in oneDNN than in PyTorch's default, on this machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    inputs, weight = torch.randn(256, 512), torch.randn(512, 512)

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            product(inputs, weight)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return seconds(functional.linear) > WORTHWHILE_SPEED_UP * seconds(_onednn)


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """A linear layer whose weights are constants."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        ctx.save_for_backward(weight)
        return _onednn(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple:  # noqa: D102 # pyright: ignore
        return _onednn(output_gradient, ctx.saved_tensors[0].T), None, None


class _ProductAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v; all but the mask of shape (rows, heads, tokens, features)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return _probabilities(query, key, mask, scale) @ value

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple:  # noqa: D102 # pyright: ignore
        query, key, value, mask = ctx.saved_tensors
        probabilities = _probabilities(query, key, mask, ctx.scale)
        pulled = torch._softmax_backward_data(
            output_gradient @ value.transpose(-1, -2), probabilities, -1, probabilities.dtype
        ).mul_(ctx.scale)
        return (
            pulled @ key,
            pulled.transpose(-1, -2) @ query,
            probabilities.transpose(-1, -2) @ output_gradient,
            None,
            None,
        )


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax((query * scale @ key.transpose(-1, -2)).add_(mask), -1)
