"""What a run says on the terminal, with rich; everything goes to stderr, so that stdout stays for results."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Reporter:
    """Messages, tables and progress bars of a command.

    Args:
        quiet: Whether to say nothing but errors.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        if not self.console.is_terminal:
            # In a log file there is no edge to wrap at.
            self.console = Console(stderr=True, quiet=quiet, highlight=False, width=200)

    def say(self, message: str) -> None:
        """Prints a line; names of files and classes in it are printed as they are."""
        self.console.print(escape(message), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Prints a table; the first column is left-aligned, the others right-aligned."""
        table = Table(title=escape(title), title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator["Bar"]:
        """Shows a progress bar while the block runs; it vanishes at the end, and off a terminal it never shows."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=self.console, transient=True)
        bar = Bar(progress, progress.add_task(escape(description), total=total))
        if self.quiet or not self.console.is_terminal:
            # Some versions of rich end even a disabled bar with a line break.
            yield bar
            return
        with progress:
            yield bar


class Bar:
    """One progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """Moves the bar to `done`; changes its end or its text if given."""
        text = None if description is None else escape(description)
        self._progress.update(self._task, completed=done, total=total, description=text)


def hide_loading_bars() -> None:
    """Keeps transformers from showing a bar while it loads or saves weights, which takes a moment only."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def printable(text: str) -> str:
    """Keeps control characters of file and class names from reaching the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
