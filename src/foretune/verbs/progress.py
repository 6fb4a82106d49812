"""Progress in the terminal: one line a stage, a bar for long passes; silent on request and on other processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from foretune import processes


class Progress:
    """Where a verb says what it is doing.

    Args:
        console: the terminal.
        quiet: say nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """Write to standard error by default, so that standard output holds results alone."""
        self.quiet = quiet or not processes.is_main()
        self.console = console or Console(stderr=True, quiet=self.quiet)

    @classmethod
    def silent(cls) -> "Progress":
        """Say nothing."""
        return cls(quiet=True)

    def say(self, text: str) -> None:
        """One line, as it is: a behaviour's name may look like markup."""
        self.console.print(Text(text, style="dim"), highlight=False)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; yields a function that takes how many are done so far."""
        named = TextColumn("{task.description}", markup=False)
        columns = (named, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=self.console, disable=self.quiet, transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, completed=done)
