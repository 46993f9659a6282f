"""The near duplicates that an audit found, as pictures side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from torchthaw.data.views import ImageView
from torchthaw.errors import DataError
from torchthaw.evaluation.mistakes import thumbnail

MOST_PAIRS = 8
# In this order: what makes figures wrong comes first.
KINDS = (
    "near duplicates across splits",
    "near duplicates under different labels",
    "near duplicates within a split",
)


@dataclass(frozen=True)
class Copy:
    """One picture of a pair.

    Attributes:
        path: Where it is.
        split: Split that it is in.
        label: Its class.
        picture: The image, a few hundred pixels wide at most.
    """

    path: str
    split: str
    label: str
    picture: Image.Image


@dataclass(frozen=True)
class Pair:
    """Two pictures that are nearly the same, alike by `likeness` (a correlation)."""

    first: Copy
    second: Copy
    likeness: float | None


def show_near_copies(audit: Mapping[str, Any], views: Sequence[ImageView], limit: int = MOST_PAIRS) -> list[Pair]:
    """Makes pictures of near duplicates, those across splits first.

    Args:
        audit: The content of `audit.json`.
        views: All images that there are; a pair of which one image is not among them, or cannot be read any more, is
            passed over.
        limit: How many pairs at most.
    """
    wanted = _pairs(audit)
    if not wanted:
        return []
    where: dict[str, tuple[ImageView, int]] = {}
    paths = {image["path"] for item in wanted for image in item["images"]}
    for view in views:
        listed = view.dataset["path"][:] if "path" in view.dataset.column_names else []
        where |= {path: (view, row) for row, path in enumerate(listed) if path in paths}
    shown: list[Pair] = []
    for item in wanted:
        if len(shown) == limit:
            break
        try:
            pair = [_copy(image, where) for image in item["images"][:2]]
        except (DataError, KeyError):
            continue
        shown.append(Pair(pair[0], pair[1], item.get("likeness")))
    return shown


def _pairs(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the pairs in the order of `KINDS`, each once."""
    by_kind = {finding["name"]: finding.get("items", ()) for finding in audit.get("findings", ())}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for kind in KINDS:
        for item in by_kind.get(kind, ()):
            if len(item.get("images", ())) >= 2:
                found.setdefault(tuple(image["path"] for image in item["images"]), item)
    return list(found.values())


def _copy(image: Mapping[str, Any], where: Mapping[str, tuple[ImageView, int]]) -> Copy:
    view, row = where[image["path"]]
    return Copy(image["path"], str(image["split"]), str(image["label"]), thumbnail(view.value(row)))
