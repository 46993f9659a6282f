"""What the plots share: colours, stages, legends and saving, without matplotlib's global state.

Colours are those of Okabe and Ito (2008) and the `Blues` and `cividis` maps, which people with colour vision deficiency
tell apart. Names are drawn letter by letter: `$` and `_` in them are no markup.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.text import Text

from torchthaw.evaluation.files import replacing

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = PALETTE
LINE_STYLES = ("-", "--", ":", "-.")
STAGE_SHADES = ("#EDEDED", "#FFFFFF")
STAGE_COLUMNS = 3
LEGEND_ROWS = 20
# Inches that one line of a legend is high, and one column of names is wide.
ROW_HEIGHT = 0.22
COLUMN_WIDTH = 2.4

Stages = Sequence[Mapping[str, Any]]
Borders = Sequence[tuple[float, float]]


def line_look(index: int, number: int) -> tuple[Any, str]:
    """Colour and style of one of `number` lines: separate hues for a few, a scale by depth for many."""
    style = LINE_STYLES[index % len(LINE_STYLES)]
    if number <= len(PALETTE):
        return PALETTE[index], style
    return matplotlib.colormaps["cividis"](0.95 * index / (number - 1)), style


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches, at 120 dots per inch."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def figure_with_stages(width: float, height: float, stages: Stages, *, lines: int = 0) -> Figure:
    """A figure of the given size in inches, larger where many stages and many lines have to be named."""
    more_columns = max(0, math.ceil(lines / LEGEND_ROWS) - 1)
    rows = math.ceil(len(stages) / STAGE_COLUMNS)
    return new_figure(width + COLUMN_WIDTH * more_columns, height + ROW_HEIGHT * rows)


def shade_stages(axes: Axes, borders: Borders, stages: Stages) -> None:
    """Draws a band per stage, from `start` to `end` of its border, hatched where the stage was rolled back."""
    for index, ((start, end), stage) in enumerate(zip(borders, stages, strict=True)):
        axes.axvspan(start, end, zorder=0, linewidth=0, **_band_look(index, stage))
    for start, _ in borders[1:]:
        axes.axvline(start, color="#808080", linewidth=0.8, zorder=1)


def name_stages(figure: Figure, axes: Axes, borders: Borders, stages: Stages) -> None:
    """Numbers the bands above the axes and names the numbers below the plot: names side by side would overlap."""
    for number, (start, end) in enumerate(borders, start=1):
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 4), "textcoords": "offset points"}
        axes.annotate(str(number), ((start + end) / 2, 1), ha="center", **place)  # type: ignore[arg-type]
    if not stages:
        return
    names = [
        f"{number}  {drawable(stage['name'])}{' (rolled back)' if _rolled_back(stage) else ''}"
        for number, stage in enumerate(stages, start=1)
    ]
    legend = figure.legend(
        [Patch(**{"edgecolor": "#808080", **_band_look(index, stage)}) for index, stage in enumerate(stages)],
        _placeholders(names),
        loc="outside lower center",
        ncols=min(STAGE_COLUMNS, len(stages)),
        title="stages",
        frameon=False,
    )
    _set_entries(legend, names)


def legend_beside(axes: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Puts the legend to the right of the axes, where it covers no line."""
    legend = axes.legend(
        handles,
        _placeholders(names),
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        ncols=math.ceil(len(names) / LEGEND_ROWS),
        frameon=False,
    )
    _set_entries(legend, [drawable(name) for name in names])


def say_nothing_logged(axes: Axes) -> None:
    """Says on empty axes why they are empty."""
    axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center")
    axes.yaxis.set_visible(False)


def drawable(name: object, length: int = 30) -> str:
    """The name on one line, shortened in the middle, with a replacement for what no font can draw."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(name))
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


def save(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Writes the figure as a PNG, whole or not at all."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_usetex(False)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi="figure")


def _band_look(index: int, stage: Mapping[str, Any]) -> dict[str, Any]:
    shade = STAGE_SHADES[index % len(STAGE_SHADES)]
    if _rolled_back(stage):
        return {"facecolor": shade, "edgecolor": "#BBBBBB", "hatch": "///"}
    return {"facecolor": shade}


def _rolled_back(stage: Mapping[str, Any]) -> bool:
    return stage.get("accepted") is False


def _placeholders(names: Sequence[str]) -> list[str]:
    return [str(index) for index in range(len(names))]


def _set_entries(legend: Legend, names: Sequence[str]) -> None:
    # Set only once the legend stands, because matplotlib before 3.10 drops entries that begin with an underscore.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
