"""Finds images and their labels in a folder: class folders, splits, or a metadata file."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchthaw.data.images import image_extensions
from torchthaw.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
GROUPS_FILE = "groups.csv"
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Record:
    """An image file and its label.

    Attributes:
        file: Where it is.
        path: The same relative to the source, with forward slashes.
        label: Class name or whole number; of a metadata file, whatever is written there.
        more: What else a metadata file says, as text: `group` and `time`, where asked for.
    """

    file: str
    path: str
    label: Any
    more: Mapping[str, str | None] = field(default_factory=dict)


def split_of(name: str) -> str | None:
    """Returns "train", "validation" or "test" for any of their usual names, else `None`."""
    return _SPLIT_NAMES.get(name.lower())


def listing(items: list[str], limit: int = 20) -> str:
    """Writes names for a message: quoted, control characters escaped, the first ones and how many more."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(repr(item) for item in items[:limit]) + more


def metadata_file(folder: Path) -> Path | None:
    """Returns the metadata file of a folder, or `None`."""
    found = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{str(folder)!r} has both {' and '.join(METADATA_FILES)}; keep one of them.")
    return found[0] if found else None


def split_folders(root: Path) -> dict[str, Path] | None:
    """Decides whether the top-level folders are splits.

    They are when one is named like a training split, or all like others, and hold class folders or a metadata file. A
    class may be called "test", so names alone decide nothing.

    Returns:
        The folder of each split, or `None` where the top-level folders are classes.

    Raises:
        DataError: Two folders name the same split, or splits and classes are mixed.
    """
    folders = _subfolders(root)
    named = [(split_of(folder.name), folder) for folder in folders]
    splits = [(split, folder) for split, folder in named if split]
    others = [folder for split, folder in named if not split and next(_images(folder), None)]
    train = next((folder for split, folder in splits if split == "train"), None)
    if train is None:
        are_splits = not others and all(map(_is_labelled, (folder for _, folder in splits)))
        return dict(splits) if splits and are_splits else None
    if not _is_labelled(train):
        if others:
            return None
        raise DataError(
            f"The images of {str(train)!r} lie directly in it. Sort them into one folder per class, as in "
            f"{train.name}/cat/1.jpg, or add {METADATA_FILES[0]} with the columns file_name and label."
        )
    if others and len(splits) == 1:
        raise DataError(
            f"{str(root)!r} mixes {train.name!r}, which looks like the training split, with "
            f"{listing([folder.name for folder in others])}. Name the other splits 'validation' and 'test'; if all are "
            f"classes, rename {train.name!r}."
        )
    twice = [split for split, count in Counter(split for split, _ in splits).items() if count > 1]
    if twice:
        names = [folder.name for split, folder in splits if split in twice]
        raise DataError(f"{str(root)!r} has several folders for one split: {listing(names)}; keep one of them.")
    if others:
        logger.warning("Left out, as they are no splits: %s.", listing([folder.name for folder in others]))
    return dict(splits)


def read_class_folders(folder: Path, root: Path) -> list[Record]:
    """Lists the images of class folders, sorted by path; files deeper inside a class folder belong to that class.

    Args:
        folder: Holds one folder per class.
        root: What the paths of the records are relative to.

    Raises:
        DataError: There are no class folders, or some are empty.
    """
    classes = _subfolders(folder)
    loose = sorted(path.name for path in folder.iterdir() if not path.is_dir() and path != root / GROUPS_FILE)
    if not classes:
        pictures = [name for name in loose if _is_image(name)]
        if pictures:
            raise DataError(
                f"{str(folder)!r} holds {len(pictures)} images but no class folders. Sort them into one folder per "
                f"class, as in cat/1.jpg, or add {METADATA_FILES[0]} with the columns file_name and label."
            )
        raise DataError(
            f"No images in {str(folder)!r}. Pass a folder with one folder per class, as in cat/1.jpg, or with splits, "
            "as in train/cat/1.jpg."
        )
    left_out = list(loose)
    records = []
    empty = []
    for class_folder in classes:
        files = list(_files(class_folder))
        images = [file for file in files if _is_image(file)]
        left_out += [file for file in files if not _is_image(file)]
        if not images:
            empty.append(class_folder.name)
        records += [Record(file, relative(file, root), class_folder.name) for file in images]
    if empty:
        raise DataError(
            f"No images in {len(empty)} class folder{'s'[: len(empty) > 1]} of {str(folder)!r}: {listing(empty)}. "
            "Add images or remove the folder."
        )
    _warn_of_left_out(left_out, folder)
    return sorted(records, key=lambda record: record.path)


def relative(file: str, root: Path) -> str:
    """Returns a file's path relative to the root with forward slashes."""
    path = Path(os.path.relpath(file, root)).as_posix()
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The file name {path!r} is not valid UTF-8; rename the file.") from error
    return path


def _is_labelled(folder: Path) -> bool:
    return bool(_subfolders(folder) or metadata_file(folder))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> Iterator[str]:
    """Walks through a folder, symbolic links included, hidden folders excluded, each folder once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names))  # noqa: PTH118 (millions of files)


def _images(folder: Path) -> Iterator[str]:
    return (file for file in _files(folder) if _is_image(file))


def _is_image(file: str) -> bool:
    name = os.path.basename(file)  # noqa: PTH119 (millions of files)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()  # noqa: PTH122


def _warn_of_left_out(files: list[str], folder: Path) -> None:
    if files:
        kinds = Counter("hidden" if Path(file).name.startswith(".") else Path(file).suffix.lower() for file in files)
        counts = ", ".join(f"{count} {kind or 'without extension'!s}" for kind, count in kinds.most_common(10))
        examples = listing([Path(file).name for file in files], 3)
        logger.warning(
            "Left out %d files of %r that are no class images (%s): %s.", len(files), str(folder), counts, examples
        )
