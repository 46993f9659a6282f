"""Class names of images matched to the classes of pretrained weights."""

import difflib
import re
from collections.abc import Mapping, Sequence

from torchthaw.errors import DataError, did_you_mean

_WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 5


def match_classes(
    names: Sequence[str],
    source_names: Sequence[str] | None,
    number: int,
    *,
    given: Mapping[str | int, str | int] | None = None,
    imagenet: bool = False,
    what: str = "the images",
    source: str = "the weights",
) -> list[int]:
    """Finds the output of pretrained weights for each class of images.

    A class is known by the weights' own name of it, upper and lower case, `_`, `-` and blanks being alike; else by its
    number, from 0 on; else, for ImageNet, by its WordNet id such as n01440764. The ids of all 1000 classes are in their
    order; for fewer, the table is that of timm where it is installed.

    Args:
        names: Classes of the images.
        source_names: Classes of the weights in the order of the outputs; None where they have no names.
        number: Number of outputs.
        given: What classes of the images are called in the weights (name, number or WordNet id), where not the same.
        imagenet: Whether the weights' classes are those of ImageNet-1K, in torchvision's order.
        what: What messages call the images.
        source: What they call the weights.

    Returns:
        The number of the output of each class.

    Raises:
        DataError: some classes are none of the weights', or `given` has a class that the images have not.
    """
    given = {str(name): word for name, word in (given or {}).items()}
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise DataError(
            f"forgetting.names has {unknown!r}, which is no class of {what}.{did_you_mean(unknown, names)} Its classes "
            f"are {_some(names)}."
        )
    wanted = {name: str(given.get(name, name)) for name in names}
    table = _wordnet_table(list(wanted.values())) if imagenet else None
    known = {} if source_names is None else _by_plain_name(source_names)
    found = {name: _find(word, source_names or (), known, number, table) for name, word in wanted.items()}
    missing = [name for name, index in found.items() if index is None]
    if missing:
        raise DataError(_explain(missing, wanted, source_names, number, imagenet, what, source))
    return [index for index in found.values() if index is not None]


def _find(
    word: str, names: Sequence[str], known: Mapping[str, list[int]], number: int, table: Mapping[str, int] | None
) -> int | None:
    if word in names:
        return names.index(word)
    alike = known.get(_plain(word), [])
    if len(alike) == 1:
        return alike[0]
    if word.isascii() and word.isdigit() and int(word) < number:
        return int(word)
    return None if table is None else table.get(word)


def _by_plain_name(names: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(_plain(name), []).append(index)
    return found


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", name).casefold().split())


def _wordnet_table(words: Sequence[str]) -> dict[str, int] | None:
    """Returns the class of each WordNet id; None where no word is one, or no table can be had."""
    ids = sorted({word for word in words if _WORDNET_ID.fullmatch(word)})
    if not ids:
        return None
    if len(ids) == 1000:
        # The classes of ImageNet-1K are numbered in this order.
        return {wordnet_id: index for index, wordnet_id in enumerate(ids)}
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return None
    return {wordnet_id: index for index, wordnet_id in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _explain(
    missing: Sequence[str],
    wanted: Mapping[str, str],
    names: Sequence[str] | None,
    number: int,
    imagenet: bool,
    what: str,
    source: str,
) -> str:
    first = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    called = "" if wanted[first] == first else f" (called {wanted[first]!r} in forgetting.names)"
    start = f"the class {first!r}{called}{more} of {what} is none of the {number:,} classes of {source}"
    if imagenet and _WORDNET_ID.fullmatch(wanted[first]):
        return (
            f"{start}, or its WordNet id cannot be looked up: that takes the table of timm (pip install timm). Else "
            f"name the folders by the classes' names or numbers, or write forgetting: {{names: {{{first}: tench}}}}"
        )
    if names is None:
        return (
            f"{start}, which has no class names, so that classes are known by number, 0 to {number - 1}; rename the "
            f"folders, or write forgetting: {{names: {{{first}: 0}}}}"
        )
    example = next(iter(difflib.get_close_matches(wanted[first], names, n=1, cutoff=0.5)), names[0])
    return (
        f"{start}.{did_you_mean(wanted[first], names)} Rename the folders, or write which class it is: forgetting: "
        f"{{names: {{{first}: {example}}}}}; the classes are {_some(names)}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
