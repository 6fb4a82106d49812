"""Choose between float32 and bfloat16 by measuring, not by assuming."""

import time

import torch

# A gain smaller than this is not worth bfloat16's rounding.
WORTHWHILE_SPEED_UP = 1.3


def matmul_seconds(dtype: torch.dtype, device: torch.device, *, size: int = 768, repeats: int = 5) -> float:
    """Median seconds of one `size`³ matrix product, after a warm-up."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats + 2):
        _synchronise(device)
        start = time.perf_counter()
        left @ right
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[repeats // 2]


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products in it are clearly faster on `device`, else float32."""
    gain = matmul_seconds(torch.float32, device) / matmul_seconds(torch.bfloat16, device)
    return torch.bfloat16 if gain >= WORTHWHILE_SPEED_UP else torch.float32


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
