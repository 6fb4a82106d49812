"""Choose between float32 and bfloat16 by measuring, not by assuming."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A gain smaller than this is not worth bfloat16's rounding.
WORTHWHILE_SPEED_UP = 1.3

# Of how many `exact_float32_products` the process is inside.
_exact = 0


def matmul_seconds(dtype: torch.dtype, device: torch.device, *, size: int = 768, repeats: int = 5) -> float:
    """Median seconds of one `size`³ matrix product, after a warm-up."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats + 2):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[repeats // 2]


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products in it are clearly faster on `device`, else float32."""
    gain = matmul_seconds(torch.float32, device) / matmul_seconds(torch.bfloat16, device)
    return torch.bfloat16 if gain >= WORTHWHILE_SPEED_UP else torch.float32


@contextmanager
def float32_products_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 matrix products may treat their factors as `dtype` if it is bfloat16; they add in float32.

    So factors that are bfloat16 numbers already are multiplied exactly, several times as fast: on CPUs by oneDNN's
    bfloat16 products, on CUDA devices by TF32, which holds bfloat16 numbers.
    """
    if dtype != torch.bfloat16 or _exact:
        yield
        return
    mkldnn, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = mkldnn.fp32_precision, cuda.fp32_precision
    mkldnn.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        mkldnn.fp32_precision, cuda.fp32_precision = before


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Inside, in all threads, `float32_products_of` changes nothing.

    The precision is the process's: threads side by side would set it for each other's products of other numbers.
    """
    global _exact
    _exact += 1
    try:
        yield
    finally:
        _exact -= 1


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
