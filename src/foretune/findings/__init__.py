"""Findings: one file each, evidence and remedy in words, ranked by severity."""

from foretune.findings.finding import AnswerCounts, Evidence, Finding, find_all

__all__ = ["AnswerCounts", "Evidence", "Finding", "find_all"]
