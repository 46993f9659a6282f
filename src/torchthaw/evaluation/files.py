"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `file` to write to, and moves it to `file` when the block ends without an error.

    Missing parent folders are made. After an error, `file` is as it was before.
    """
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same name each time, so that one which a killed process left is taken over.
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
