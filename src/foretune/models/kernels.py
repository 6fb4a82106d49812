"""A faster CPU kernel for frozen models, behind the function that every architecture calls.

float32 linear layers go through oneDNN where that is measurably faster than PyTorch's BLAS: on AMD processors MKL
reaches less than half of it.
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
# Kernels take turns so often; what is fastest must not hang on what else the machine does.
ROUNDS = 20


class FrozenKernels(TorchFunctionMode):
    """Within this context, frozen linear layers on a CPU run on the fastest kernel there is."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and _suits_onednn(*args):
            return _OneDnnLinear.apply(*args, *[None] * (3 - len(args)))
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


@functools.cache
def onednn_is_faster() -> bool:
    """Whether a float32 product of ordinary size is faster in oneDNN than in PyTorch's default, on this machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    products, threads = (functional.linear, _onednn), torch.get_num_threads()
    inputs, weight = torch.randn(256, 512), torch.randn(512, 512)
    try:
        torch.set_num_threads(1)  # several wait for each other where other processes compute
        taken = [[_seconds(product, inputs, weight) for product in products] for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    usual, onednn = map(min, zip(*taken, strict=True))
    return usual > WORTHWHILE_SPEED_UP * onednn


def _seconds(product: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    product(inputs, weight)
    return time.perf_counter() - start


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
