"""Plots of pictures in rows and columns, with a few lines of text below each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from torchthaw.evaluation.drawing import drawable, save
from torchthaw.evaluation.mistakes import Mistake
from torchthaw.evaluation.near_copies import Pair

PathLike = str | os.PathLike[str]

# Inches: side of a picture, room around it, height of a line of text.
_SIDE, _GAP, _LINE, _TITLE = 2.0, 0.2, 0.17, 0.45
# Between two sets of pictures that belong together.
_APART = 0.5
_FONT = 9
_COLUMNS = 4
_LONGEST = 60


@dataclass(frozen=True)
class Tile:
    """A picture and the lines below it: what is said of a name, and the name, which is shortened to fit."""

    picture: Image.Image
    lines: tuple[tuple[str, str], ...]


def plot_mistakes(mistakes: Sequence[Mistake], split: str, file: PathLike) -> None:
    """Draws the worst mistakes in a grid, the surest first; without any, removes the file.

    Args:
        mistakes: What `show_mistakes` gives.
        split: The split that they are from.
        file: Where to write the PNG.
    """
    tiles = [
        Tile(
            mistake.picture,
            (
                ("true: ", mistake.label),
                ("predicted: ", mistake.predicted),
                (f"score {mistake.score:.3f} (true: {mistake.label_score:.3f})", ""),
                ("", _last_part(mistake.path or "")),
            ),
        )
        for mistake in mistakes
    ]
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    _plot(rows, f"worst mistakes, {split} images", file)


def plot_activation_maps(mistakes: Sequence[Mistake], split: str, file: PathLike) -> None:
    """Draws mistakes beside what speaks for either class in them; without maps, removes the file.

    Args:
        mistakes: What `show_mistakes` gives.
        split: The split that they are from.
        file: Where to write the PNG.
    """
    sets = [
        [
            Tile(mistake.maps.seen, (("what the network saw", ""),)),
            Tile(mistake.maps.for_predicted, (("for ", mistake.predicted), ("(predicted)", ""))),
            Tile(mistake.maps.for_label, (("for ", mistake.label), ("(true)", ""))),
        ]
        for mistake in mistakes
        if mistake.maps is not None
    ]
    _plot(_two_abreast(sets), f"what speaks for a class (Grad-CAM), {split} images", file, apart=3)


def plot_near_copies(pairs: Sequence[Pair], file: PathLike) -> None:
    """Draws near duplicates side by side, with split, class and path; without any, removes the file.

    Args:
        pairs: What `show_near_copies` gives.
        file: Where to write the PNG.
    """
    sets = [
        [
            Tile(copy.picture, ((f"{copy.split}: ", copy.label), ("", _last_part(copy.path))))
            for copy in (pair.first, pair.second)
        ]
        for pair in pairs
    ]
    _plot(_two_abreast(sets), "near duplicates", file, apart=2)


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _two_abreast(sets: list[list[Tile]]) -> list[list[Tile]]:
    return [[tile for tiles in sets[start : start + 2] for tile in tiles] for start in range(0, len(sets), 2)]


def _plot(rows: Sequence[Sequence[Tile]], title: str, file: PathLike, *, apart: int | None = None) -> None:
    """Draws tiles in rows; after `apart` of them there is more room."""
    if not rows:
        Path(file).unlink(missing_ok=True)
        return
    # Placed by hand: a layout engine would need seconds for so many axes.
    columns = max(2, *(len(row) for row in rows))
    lines = max(len(tile.lines) for row in rows for tile in row)
    step = _SIDE + 1.5 * _GAP + _LINE * lines
    width = columns * (_SIDE + _GAP) + _GAP + (_APART if apart is not None and columns > apart else 0)
    height = len(rows) * step + _TITLE
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    figure.text(_GAP / width, 1 - 0.12 / height, title, fontsize=12, va="top")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            left = _GAP + column * (_SIDE + _GAP) + (_APART if apart is not None and column >= apart else 0)
            _draw(figure, tile, left=left, top=height - _TITLE - number * step)
    save(figure, file)


def _draw(figure: Figure, tile: Tile, *, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    scale = _SIDE / max(tile.picture.size)
    wide, high = scale * tile.picture.width, scale * tile.picture.height
    bottom = top - _SIDE
    axes = figure.add_axes((((left + (_SIDE - wide) / 2) / width), bottom / height, wide / width, high / height))
    axes.imshow(np.asarray(tile.picture), aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    for number, (said, name) in enumerate(tile.lines):
        y = top - _SIDE - 0.06 - number * _LINE
        text = figure.text(left / width, y / height, "", fontsize=_FONT, va="top", parse_math=False)
        _fit(text, said, name, figure.dpi * (_SIDE + 0.8 * _GAP))


def _fit(text: Text, said: str, name: str, width: float) -> None:
    """Sets a text, its name shortened in the middle until all of it is not wider than so many dots."""
    length = min(len(name), _LONGEST)
    text.set_text(said + drawable(name, length))
    while text.get_window_extent().width > width and length > 3:
        length -= max(1, length // 12)
        text.set_text(said + drawable(name, length))
