"""What every verb ends with: the report is written, the summary shown."""

from foretune import processes
from foretune.records import RunFolder
from foretune.report import build_report, print_summary


def finish(run: RunFolder) -> None:
    """Write report.html and print the summary, on the main process alone."""
    if not processes.is_main():
        return
    page = build_report(run.path)
    print_summary(run.path)
    print(f"report: {page}")
