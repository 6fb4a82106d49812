"""Verification: the forecast laid beside what happened."""

from foretune.verification.compare import Verification, compare, judge_revisions

__all__ = ["Verification", "compare", "judge_revisions"]
