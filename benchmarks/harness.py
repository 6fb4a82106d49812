"""What benchmarks have in common: the machine in words, its ceilings, methods that take turns, results as files."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from foretune.models.dtype import matmul_seconds
from foretune.models.kernels import onednn_is_faster
from foretune.records.provenance import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the software that results belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions(),
    }


def matmul_ceiling(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of a 2048³ matrix product in the fastest library there is: what a forward pass could reach at best."""
    size = 2048
    seconds = [matmul_seconds(dtype, torch.device(device), size=size, repeats=5)]
    if device == "cpu" and dtype == torch.float32 and onednn_is_faster():
        left, right = torch.randn(2, size, size)
        for _ in range(3):
            start = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def copy_ceiling(bytes_copied: int = 2**28) -> float:
    """Bytes read and written per second by a large copy in memory."""
    source = torch.ones(bytes_copied // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * bytes_copied / median(seconds)


def race(
    methods: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    earlier: dict[str, list[float]] | None = None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each method in each round; they take turns, so that a slow minute slows all of them.

    Args:
        methods: by name.
        rounds: how often each is timed.
        earlier: seconds of an earlier race of the same methods, to which these are added.
        warm_up: run each once beforehand, untimed.
    """
    if warm_up:
        for method in methods.values():
            method()
    seconds = {name: [*(earlier or {}).get(name, [])] for name in methods}
    for turn in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
            print(f"  round {turn + 1}/{rounds} {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def times_faster(seconds: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """How many times as fast `ours` is as each other method: median, least and largest ratio of the same round."""
    found = {}
    for name, theirs in seconds.items():
        if name != ours:
            ratios = [slow / fast for slow, fast in zip(theirs, seconds[ours], strict=True)]
            found[name] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


@contextmanager
def seconds_in(owner: type, name: str) -> Iterator[list[float]]:
    """CPU seconds of every call of a method meanwhile."""
    original, found = getattr(owner, name), []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.process_time()
        try:
            return original(*arguments, **keywords)
        finally:
            found.append(time.process_time() - start)

    with patch.object(owner, name, timed):
        yield found


def read(name: str) -> dict[str, Any] | None:
    """results/{name}.json, or None where it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(name: str, result: dict[str, Any]) -> None:
    """Write results/{name}.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
