"""What libraries say while a command runs: each thing once, and above the progress bar instead of through it."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchthaw.console.reporter import Reporter


class _OnceHandler(logging.Handler):
    """Prints each message once."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.say(record.levelno, record.getMessage(), record.name.split(".")[0])
        except Exception:  # noqa: BLE001  # as logging's own handlers: a message is no reason to fail
            self.handleError(record)

    def say(self, level: int, message: str, origin: str) -> None:
        """Prints a message unless it was printed before; of a quiet command only errors, straight to stderr."""
        line = f"{logging.getLevelName(level).lower()} ({origin}): {message}"
        if line in self._said:
            return
        self._said.add(line)
        if not self._reporter.quiet:
            self._reporter.say(line)
        elif level >= logging.ERROR:
            print(self._reporter.shown(line), file=sys.stderr)


@contextmanager
def said_once(reporter: Reporter) -> Iterator[None]:
    """Takes the place of handlers that write to stderr, and of the printing of Python's warnings, for a block."""
    handler = _OnceHandler(reporter)
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    replaced = [(logger, old) for logger in loggers for old in logger.handlers if _writes_to_stderr(old)]
    for logger, old in replaced:
        logger.removeHandler(old)
        logger.addHandler(handler)
    # Where nothing is set up, logging would write to stderr itself.
    logging.getLogger().addHandler(handler)
    show, warnings.showwarning = warnings.showwarning, lambda *args, **_: _show_warning(handler, *args)
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.getLogger().removeHandler(handler)
        for logger, old in replaced:
            logger.removeHandler(handler)
            logger.addHandler(old)


def _show_warning(handler: _OnceHandler, message: Warning | str, category: type[Warning], *_: Any) -> None:
    handler.say(logging.WARNING, str(message), category.__name__)


def _writes_to_stderr(handler: logging.Handler) -> bool:
    return type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__)
