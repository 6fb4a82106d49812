"""What a result was computed from: versions, hashes, device."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

PACKAGES = ("foretune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def sha256_of(*parts: Any) -> str:
    """A hash of JSON-ready values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def pairs_hash(pairs: Iterable[Any]) -> str:
    """A hash of encoded pairs, in their order: tokens, behaviours, splits, weights."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(list(pair)).encode())
    return digest.hexdigest()
