"""Plain errors of transformers as messages for users."""

from collections.abc import Iterator
from contextlib import contextmanager

from torchthaw.errors import ThawError


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns plain ValueErrors of transformers, and of the modeling code saved with models, into ThawError."""
    try:
        yield
    except ThawError:
        raise
    except ValueError as error:
        raise ThawError(str(error)) from error
