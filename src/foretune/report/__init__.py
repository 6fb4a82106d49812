"""The report of a run folder: an HTML page, a terminal summary, JSON, a model-card block; reads the folder alone."""

from foretune.report.card import model_card_block, to_json
from foretune.report.comparison import build_comparison, print_comparison
from foretune.report.html import build_report
from foretune.report.reproduction import build_reproduction, print_reproduction
from foretune.report.terminal import print_summary, summary

__all__ = [
    "build_comparison",
    "build_report",
    "build_reproduction",
    "model_card_block",
    "print_comparison",
    "print_reproduction",
    "print_summary",
    "summary",
    "to_json",
]
