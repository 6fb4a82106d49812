"""Attention by products gives what PyTorch's own attention gives, forward and backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from foretune.models import product_attention
from foretune.models.attention import tree_attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("queries", [4, 128])
def test_products_equal_the_fused_kernel_in_float64(dtype, tolerance, autocast, queries, monkeypatch):
    monkeypatch.setattr(product_attention, "QUERIES_AT_ONCE", queries)
    monkeypatch.setitem(product_attention.SCORES_AT_ONCE, "cpu", 200)
    torch.manual_seed(0)
    given = [torch.randn(3, heads, 19, 8, dtype=torch.float64).to(dtype) for heads in (4, 2, 2)]
    mask = torch.ones(19, 19, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    mask[1, :, 12:, 6:12] = False
    mask.grid = None
    direction = torch.randn(3, 19, 4, 8).to(dtype)

    def attend(query, key, value):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)

    exact = [part.double().requires_grad_() for part in given]
    output = attend(*exact).transpose(1, 2)
    expected = [output, *torch.autograd.grad(output, exact, direction.double())]
    leaves = [part.requires_grad_() for part in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, _ = tree_attention(torch.nn.Identity(), *leaves, mask, scaling=0.3)
    assert type(output.grad_fn).__name__ == "_ProductsBackward"
    for found, wanted in zip([output, *torch.autograd.grad(output, leaves, direction)], expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


def attended(tokens):
    leaves = [torch.randn(2, heads, tokens, 8).requires_grad_() for heads in (4, 2, 2)]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask.grid = None
    return tree_attention(torch.nn.Identity(), *leaves, mask, scaling=0.3)[0], leaves


def test_memory_of_scores_is_used_again_whatever_the_mode_and_the_size(monkeypatch):
    monkeypatch.setattr(product_attention, "LARGEST_ROOM", 2 * 4 * 8 * 8)  # the longest gets memory of its own
    torch.manual_seed(0)
    expected = [torch.autograd.grad(output.sum(), leaves) for output, leaves in map(attended, (5, 9, 7))]
    torch.manual_seed(0)

    def in_a_thread_without_memory():
        found = []
        with torch.inference_mode():
            attended(6)
        torch.manual_seed(0)
        for tokens in (5, 9, 7):
            output, leaves = attended(tokens)
            with torch.inference_mode():  # between a pass and its gradients
                product_attention.product_attention(
                    *(part.detach() for part in leaves), torch.zeros(2, 1, tokens, tokens), scaling=2.0
                )
            found.append(torch.autograd.grad(output.sum(), leaves))
        return found

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(in_a_thread_without_memory).result()
    torch.testing.assert_close(found, expected, atol=0.0, rtol=0.0)
