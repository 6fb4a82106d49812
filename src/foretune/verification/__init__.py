"""Verification: the forecast laid beside what happened, and methods beside each other."""

from foretune.verification.compare import Verification, compare, judge_revisions
from foretune.verification.methods import MethodRun, compare_methods, order_agreement

__all__ = ["MethodRun", "Verification", "compare", "compare_methods", "judge_revisions", "order_agreement"]
