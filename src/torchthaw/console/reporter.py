"""Messages, tables and progress bars of a command."""

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from torchthaw.console.tables import make_table
from torchthaw.console.text import encodable, printable

# In a log file there is no edge to wrap at, but tables have to end somewhere.
_LOG_WIDTH = 200


class Reporter:
    """What a command says, to stderr.

    On a terminal, lines are broken between words and bars are drawn. Elsewhere (a pipe, a file, CI) there are plain
    lines, without control codes. `NO_COLOR` and `TERM=dumb` are respected.

    Args:
        quiet: Whether to say nothing but errors.

    Attributes:
        quiet: The same.
        draws: Whether bars can be drawn, and drawn anew.
        console: Where it goes.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        # Names such as ":bug:" are no pictures.
        self.console = Console(stderr=True, quiet=quiet, highlight=False, emoji=False)
        # Colour can be forced upon a pipe, but a bar there would be a line for each of its moments.
        is_drawable = self.console.is_interactive and sys.stderr.isatty() and not self.console.is_dumb_terminal
        self.draws = is_drawable and not quiet
        if not self.console.is_terminal:
            self.console = Console(stderr=True, quiet=quiet, highlight=False, emoji=False, width=_LOG_WIDTH)

    def say(self, message: str | Text) -> None:
        """Prints a line, or several.

        Names of files and classes in it are printed as they are, control characters as escapes. On a terminal, lines
        are broken between words, and go on below their beginning.
        """
        text = Text(message) if isinstance(message, str) else message
        for line in text.split("\n", allow_blank=True):
            self._say_line(line)

    def paste(self, line: str) -> None:
        """Prints a line that is never broken, so that it can be copied."""
        self.console.print(Text(self.shown(line)), soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        words: Collection[str] = (),
        optional: Collection[str] = (),
    ) -> None:
        """Prints a table; see `make_table`. A cell that is a `Text` may have several lines and a style."""
        shown = [
            [cell if isinstance(cell, Text) else Text(self.shown(str(cell))) for cell in row]
            for row in rows
        ]  # fmt: skip
        self.say(Text(self.shown(title), style="bold"))
        width = self.console.width
        self.console.print(make_table(columns, shown, width=width, words=words, optional=optional))

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator["Bar"]:
        """Shows a progress bar while the block runs; it vanishes at the end, and off a terminal it never shows."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=self.console, transient=True)
        bar = Bar(progress, progress.add_task(escape(self.shown(description)), total=total))
        if not self.draws:
            # Some versions of rich end even a disabled bar with a line break.
            yield bar
            return
        with progress:
            yield bar

    def shown(self, text: str) -> str:
        """Returns a text without what the terminal would obey or cannot show."""
        return encodable(printable(text), self.console.encoding)

    def _say_line(self, line: Text) -> None:
        plain = line.plain
        if self.shown(plain) != plain:
            line = Text(self.shown(plain), style=line.style)
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
            return
        indent = len(line.plain) - len(line.plain.lstrip(" "))
        self.console.print(Padding(line[indent:], (0, 0, 0, indent), expand=False))


class Bar:
    """One progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None, description: str | None = None) -> None:
        """Moves the bar to `done`; changes its end or its text if given."""
        text = None if description is None else escape(description)
        self._progress.update(self._task, completed=done, total=total, description=text)


def hide_loading_bars(*, downloads: bool = False) -> None:
    """Keeps libraries from showing bars while they load or save, which takes a moment only.

    Args:
        downloads: Whether to hide bars of downloads of weights and data sets too.
    """
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    downloads = downloads or are_progress_bars_disabled("torchthaw")
    logging.disable_progress_bar()
    if downloads:
        datasets.disable_progress_bars()
        disable_progress_bars("torchthaw")
    else:
        enable_progress_bars("torchthaw")
