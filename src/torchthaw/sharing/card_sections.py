"""A card's own and generated parts: what a person wrote stays when the card is made again."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchthaw.errors import SharingError
from torchthaw.sharing.card_metadata import Yaml12Loader

BEGIN = "<!-- torchthaw:begin (written by torchthaw; text above this line and below the end is yours and is kept) -->"
END = "<!-- torchthaw:end -->"

_BEGIN = re.compile(r"^<!-- torchthaw:begin\b[^\n]*-->[ \t]*$", re.MULTILINE)
_END = re.compile(r"^<!-- torchthaw:end\b[^\n]*-->[ \t]*$", re.MULTILINE)
_BASE = re.compile(r"^<!-- torchthaw:metadata (\{[^\n]*\}) -->$", re.MULTILINE)
# The Hub's rule: the first thing in the file, between two lines of three dashes.
_FRONT_MATTER = re.compile(r"^\s*---[ \t]*\n(.*?\n)??---[ \t]*(\n|$)", re.DOTALL)


@dataclass(frozen=True)
class OwnParts:
    """What a person may have written in a card.

    Attributes:
        before: Text between front matter and generated part.
        after: Text below the generated part.
        metadata: The front matter, generated or not.
        base: What was generated of it.
    """

    before: str = "\n"
    after: str = "\n"
    metadata: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


def own_parts(card: str, where: str = "README.md") -> OwnParts:
    """Takes a card apart.

    Args:
        card: The card as it stands. Front matter alone, such as the Hub makes for a new repository, is one, too.
        where: The file, for messages.

    Raises:
        SharingError: It is another text than a card of torchthaw, its markers do not pair, or the front matter is no
            YAML mapping.
    """
    text = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        return OwnParts()
    begins, ends = list(_BEGIN.finditer(text)), list(_END.finditer(text))
    matter = _FRONT_MATTER.match(text[: begins[0].start()] if begins else text)
    metadata = _read_metadata(matter[1] or "", where) if matter else {}
    body = matter.end() if matter else 0
    if not begins and not ends:
        if text[body:].strip():
            raise SharingError(
                f"{where} is not a card that torchthaw wrote, and text of others is never overwritten. Rename it, or "
                f"put these two lines where the generated part shall stand:\n{BEGIN}\n{END}"
            )
        return OwnParts(metadata=metadata)
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise SharingError(
            f"{where} has {len(begins)} begin and {len(ends)} end markers of torchthaw's part, and needs one pair in "
            f"this order, each alone on its line:\n{BEGIN}\n{END}"
        )
    found = _BASE.search(text, begins[0].end(), ends[0].start())
    return OwnParts(
        before=text[body : begins[0].start()],
        after=text[ends[0].end() :],
        metadata=metadata,
        base=_read_base(found[1]) if found else {},
    )


def assemble(front_matter: str, base: dict[str, Any], generated: str, own: OwnParts) -> str:
    """Puts a card together.

    Args:
        front_matter: The metadata as YAML.
        base: What of it was generated.
        generated: The generated part, Markdown.
        own: The person's parts.
    """
    # So written, nothing in it can end the comment.
    kept = json.dumps(base).replace("<", "\\u003c").replace(">", "\\u003e")
    return (
        f"---\n{front_matter.strip()}\n---\n{own.before}"
        f"{BEGIN}\n<!-- torchthaw:metadata {kept} -->\n\n{generated.strip()}\n\n{END}{own.after}"
    )


def read_card(file: Path) -> str | None:
    """Reads a card; None if there is none.

    Raises:
        SharingError: it is not text in UTF-8.
    """
    if not file.exists():
        return None
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SharingError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8, or rename it") from error


def _read_metadata(text: str, where: str) -> dict[str, Any]:
    try:
        metadata = yaml.load(text, Yaml12Loader)
    except yaml.YAMLError as error:
        raise SharingError(f"the front matter of {where} is not valid YAML: {error}; mend it") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise SharingError(
            f"the front matter of {where} is no mapping of names to values; write lines like license: mit"
        )
    return metadata


def _read_base(text: str) -> dict[str, Any]:
    try:
        base = json.loads(text)
    except ValueError:
        return {}
    return base if isinstance(base, dict) else {}
