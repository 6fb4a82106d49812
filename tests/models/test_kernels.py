"""The faster CPU kernels give what PyTorch's own give, forward and backward."""

import pytest
import torch
from tests.conftest import threads
from torch.nn import functional

from foretune.models import kernels
from foretune.models.kernels import FrozenKernels

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def both(call, *inputs):
    """Output and gradients of the inputs: usual, and within the context."""
    results = []
    for context in (torch.enable_grad(), FrozenKernels()):
        leaves = [part.clone().requires_grad_() for part in inputs]
        with context:
            output = call(*leaves)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        results.append([output, *torch.autograd.grad(output, leaves, direction)])
    return results


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN linear layers")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96, bias=bias).requires_grad_(False)
    usual, fast = both(layer, torch.randn(3, 7, 64))
    assert type(fast[0].grad_fn).__name__ == "_OneDnnLinearBackward"
    for expected, found in zip(usual, fast, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_trained_layers_are_left_alone(monkeypatch):
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    layer = torch.nn.Linear(64, 96)
    with FrozenKernels():
        layer(torch.randn(2, 64)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN linear layers")
def test_kernels_take_turns_on_one_thread_and_threads_are_as_before(monkeypatch):
    taken = []
    monkeypatch.setattr(
        kernels, "_seconds", lambda product, *_: taken.append((product, torch.get_num_threads())) or 1.0
    )
    with threads(3):
        assert not kernels.onednn_is_faster.__wrapped__()
        assert torch.get_num_threads() == 3
    assert taken == [(product, 1) for _ in range(kernels.ROUNDS) for product in (functional.linear, kernels._onednn)]
