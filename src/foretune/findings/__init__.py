"""Findings: one file each, evidence and remedy in words, ranked by severity."""

from foretune.findings.finding import Evidence, Finding, find_all

__all__ = ["Evidence", "Finding", "find_all"]
