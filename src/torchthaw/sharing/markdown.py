"""Text of any origin in Markdown: nothing in it may act as Markdown, HTML or a template."""

import re
import shlex
from collections.abc import Iterable
from urllib.parse import quote

# Joiners, which some scripts and many emoji need, although they count as unprintable.
_JOINERS = "\u200c\u200d"
# The backslash and the dollar as entities, because the Hub looks for formulas before it reads Markdown.
_ENTITIES = {"&": "&amp;", "<": "&lt;", "\\": "&#92;", "$": "&#36;"}
# An underscore within a word is no emphasis.
_ACTIVE = re.compile(r"[`*\[\]|~@^]|(?<!\w)_|_(?!\w)")
_AT_LINE_START = re.compile(r"^(\d*)([.)#+=:>-])")


def one_line(text: object) -> str:
    """Returns text in one line: runs of white space become a space, other unprintable characters escapes."""
    joined = " ".join(str(text).split())
    return "".join(
        character if character.isprintable() or character in _JOINERS else ascii(character)[1:-1]
        for character in joined
    )


def inline(text: object) -> str:
    """Returns Markdown that shows `text` as it is, for the middle of a line or a table cell."""
    escaped = "".join(_ENTITIES.get(character, character) for character in one_line(text))
    escaped = _ACTIVE.sub(lambda match: f"\\{match[0]}", escaped)
    # GitHub's Markdown makes links of bare addresses.
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", escaped.replace("://", ":\\/\\/"))


def line(text: object) -> str:
    """Returns Markdown that shows `text` as it is, for the start of a line."""
    return _AT_LINE_START.sub(r"\1\\\2", inline(text))


def paragraph(text: str) -> str:
    """Returns Markdown as one paragraph with an empty line behind it; nothing of white space."""
    joined = " ".join(text.split())
    return f"{joined}\n\n" if joined else ""


def address(text: str) -> str:
    """Returns an address or relative path that can stand in the brackets of a link."""
    return quote(text, safe=":/?#&=%@+,;")


def paragraphs(text: str | None) -> list[str]:
    """Splits plain text at empty lines."""
    return [part for part in re.split(r"\n\s*\n", (text or "").strip()) if part.strip()]


def listed(names: Iterable[str], limit: int) -> str:
    """Joins names, at most `limit`, and says how many more there are."""
    names = list(names)
    shown = ", ".join(inline(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


def code(text: object) -> str:
    """Returns what may stand between backticks or in an example in Python: letters, digits, and `._/+-` alone."""
    return re.sub(r"[^\w./+-]", "_", one_line(text), flags=re.ASCII)


def code_block(text: str, language: str = "") -> str:
    """Returns a fenced block that `text` cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def last_part(path: str) -> str:
    """Returns the last part of a path of any system, or of an address without its query."""
    parts = [part for part in re.split(r"[/\\]+", path.split("?")[0]) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else path


def is_absolute(path: str) -> bool:
    """Whether a path starts at a root, a drive or a home folder, and so says something about one machine."""
    return re.match(r"[/~\\]|[A-Za-z]:[/\\]", path) is not None


def without_absolute_paths(value: object) -> object:
    """Returns plain data in which absolute paths are shortened to their last part."""
    if isinstance(value, str):
        return last_part(value) if is_absolute(value) else value
    if isinstance(value, dict):
        return {key: without_absolute_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_absolute_paths(item) for item in value]
    return value


def shell_command(command: str) -> str:
    """Returns a command in one line, with absolute paths shortened to their last part."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    shortened = []
    for word in words:
        key, separator, value = word.partition("=")
        if separator and is_absolute(value):
            word = f"{key}={last_part(value)}"
        elif is_absolute(word):
            word = last_part(word)
        shortened.append(one_line(word))
    return shlex.join(shortened)
