"""The faster CPU kernels give what PyTorch's own give, forward and backward."""

import pytest
import torch
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


@pytest.mark.parametrize("scale", [None, 0.3])
def test_half_precision_attention_under_a_mask(scale):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8).bfloat16()
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1) > 0, torch.finfo(torch.bfloat16).min)

    def attend(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), scale=scale)

    _, fast = both(attend, query, key, value)
    assert type(fast[0].grad_fn).__name__ == "_ProductAttentionBackward"
    exact, _ = both(attend, query.float(), key.float(), value.float())
    for expected, found in zip(exact, fast, strict=True):
        torch.testing.assert_close(found.float(), expected, atol=5e-2, rtol=5e-2)
