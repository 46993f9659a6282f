"""Tables that no terminal cuts: with fewer columns where there is no room, and as lists where there is less."""

from collections.abc import Collection, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

# Longer words, such as names of files, may be broken.
_LONGEST_WORD = 20
_NEVER_BROKEN = 12
_BETWEEN = 2


def make_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    width: int,
    words: Collection[str] = (),
    optional: Collection[str] = (),
) -> RenderableType:
    """Returns a table that fits into `width`, or else a list of what would stand in each row.

    Args:
        columns: The header.
        rows: Cells, whose lines are not broken outside columns of words.
        width: Columns of the terminal.
        words: Columns of words, beside the first: left-aligned, and broken between words.
        optional: Columns that are left out, the last one first, where there is no room for them.
    """
    numbers = list(range(len(columns)))
    texts = {number for number in numbers if number == 0 or columns[number] in words}
    least = [_least(columns[number], [row[number] for row in rows], number in texts) for number in numbers]
    # A long header may take lines, before words in cells do.
    headers = [max(cell_len(name) // 3, min(cell_len(name), _LONGEST_WORD)) for name in columns]
    most = [max(least[number], headers[number], *(_widest(row[number]) for row in rows)) for number in numbers]
    dispensable = [number for number in numbers if columns[number] in optional]
    while dispensable and _total([least[number] for number in numbers]) > width:
        numbers.remove(dispensable.pop())
    if _total([least[number] for number in numbers]) > width:
        return _as_list([columns[number] for number in numbers], [[row[number] for number in numbers] for row in rows])
    widths = share_out([least[number] for number in numbers], [most[number] for number in numbers], width)
    # A box with no sides; rich draws it in ASCII where the encoding has nothing else.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, taken in zip(numbers, widths, strict=True):
        table.add_column(
            Text(columns[number]), width=taken, overflow="fold", justify="left" if number in texts else "right"
        )
    for row in rows:
        table.add_row(*(row[number] for number in numbers))
    return table


def share_out(least: Sequence[int], most: Sequence[int], width: int) -> list[int]:
    """Returns widths of columns between `least` and `most` that fill a line, the neediest columns first."""
    widths = [min(low, high) for low, high in zip(least, most, strict=True)]
    room = width - _total(widths)
    while room > 0 and widths != list(most):
        neediest = max(range(len(widths)), key=lambda number: most[number] - widths[number])
        widths[neediest] += 1
        room -= 1
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1)


def _least(header: str, cells: Sequence[Text], is_text: bool) -> int:
    pieces = header.split()
    for cell in cells:
        is_broken = is_text and cell_len(cell.plain) > _NEVER_BROKEN
        pieces += cell.plain.split() if is_broken else cell.plain.split("\n")
    longest = max(map(cell_len, pieces), default=1)
    return min(longest, max(_LONGEST_WORD, *map(cell_len, header.split()))) if is_text else longest


def _widest(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split("\n")))


def _as_list(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> RenderableType:
    lists: list[RenderableType] = []
    for row in rows:
        grid = Table.grid(padding=(0, _BETWEEN, 0, 0))
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            grid.add_row(Text(f"  {column}"), cell)
        lists += [Text.assemble(f"{columns[0]} ", (row[0].plain, "bold")), grid]
    return Group(*lists)
