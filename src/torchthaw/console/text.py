"""Names, numbers and times as they can be shown on any terminal."""

from collections.abc import Iterable

from rich.cells import cell_len, set_cell_size


def printable(text: str) -> str:
    """Keeps control characters of file and class names from reaching the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str, encoding: str) -> str:
    """Writes as escapes what a terminal of this encoding cannot show."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def shortened(text: str, width: int) -> str:
    """Returns a text that takes at most `width` columns of a terminal, at least 4."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 3).rstrip()}..."


def in_lines(parts: Iterable[str], width: int, between: str = "  ") -> list[str]:
    """Fills lines of a terminal with parts, none of which is torn apart unless it is wider than a line."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1] + between + part) <= width:
            lines[-1] += between + part
        else:
            lines.append(part)
    return [shortened(line, width) for line in lines]


def as_time(seconds: float) -> str:
    """Returns seconds as `1:05`, or `2:01:05` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def metric_name(key: str) -> str:
    """Returns the name of a metric as people write it."""
    name = key.removeprefix("eval_")
    return {"macro_f1": "macro F1", "map": "mAP"}.get(name, name.replace("_", " "))
