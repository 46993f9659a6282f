"""Streamed splits: the columns that the rest of torchthaw expects, checked as far as that is possible unread."""

from collections.abc import Mapping, Sequence

from datasets import ClassLabel, Image, IterableDataset, IterableDatasetDict

from torchthaw.data.columns import find_columns
from torchthaw.data.folders import listing
from torchthaw.data.label_set_reading import refuse_label_sets
from torchthaw.errors import DataError, did_you_mean


def as_streams(
    splits: Mapping[str, IterableDataset],
    where: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> IterableDatasetDict:
    """Gives streamed splits the columns `image` (not decoded), `label`, and `path` if there is one.

    Args:
        splits: Streams by split.
        where: What messages call the data set.
        image_column: Column with the images; found by its type by default.
        label_column: Column with the labels; found by its name or type by default.
        class_names: Classes that there may be; by default those of the training split, if it states them.

    Raises:
        DataError: columns are missing or cannot work, or a split states a class that there must not be.
    """
    found = {
        split: _as_stream(stream, f"{where} ({split})", image_column=image_column, label_column=label_column)
        for split, stream in splits.items()
    }
    names = {
        split: stream.features["label"].names
        for split, stream in found.items()
        if isinstance(stream.features["label"], ClassLabel)
    }
    known = names.get("train") if class_names is None else [str(name) for name in class_names]
    for split, stated in names.items():
        unknown = [name for name in stated if known is not None and name not in known]
        if known and unknown:
            raise DataError(
                f"{where} states classes in {split} that the known ones lack: {listing(unknown)}."
                f"{did_you_mean(unknown[0], known)} Known: {listing(known)}."
            )
    return IterableDatasetDict(found)


def _as_stream(
    stream: IterableDataset, where: str, *, image_column: str | None, label_column: str | None
) -> IterableDataset:
    if stream.features is None:
        raise DataError(
            f"{where} does not say what its columns are, so it cannot be streamed; load it without streaming, or write "
            "its columns into its card (dataset_info: features)."
        )
    image, label = find_columns(stream.features, image_column=image_column, label_column=label_column, where=where)
    refuse_label_sets(stream.features[label], where)
    columns = [image, label, *(["path"] if "path" in set(stream.features) - {image, label} else [])]
    kept = stream.select_columns(columns)
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return (kept.rename_columns(renamed) if renamed else kept).cast_column("image", Image(decode=False))
