"""Files that an evaluation leaves, which appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISTAKES, ACTIVATION_MAPS, NEAR_DUPLICATES = "mistakes.png", "activation_maps.png", "near_duplicates.png"
PICTURE_PLOTS = (MISTAKES, ACTIVATION_MAPS, NEAR_DUPLICATES)
"""Plots that show images of the data set; they are pushed nowhere without being asked."""


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
