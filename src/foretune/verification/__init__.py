"""Verification: the forecast laid beside what happened."""

from foretune.verification.compare import Verification, compare

__all__ = ["Verification", "compare"]
