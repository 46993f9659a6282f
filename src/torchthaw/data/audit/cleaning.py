"""A cleaned list of splits: what `torchthaw audit --fix` writes, and what nobody's files are changed for."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from torchthaw.data.audit.audit import Examined
from torchthaw.data.split_list import DROP, SplitRow

# What has been held out is worth more than a training image.
_WORTH = {"test": 0, "validation": 1, "train": 2}


def cleaned_splits(examined: Examined, splits: Sequence[str]) -> list[SplitRow]:
    """Decides for every image which split it belongs to, or that it is left out.

    Left out are images that cannot be decoded; all images of a picture that has several labels; of the same picture
    all but one; and of near duplicates in different splits all but those in one of them. Test images stay rather than
    validation images, and these rather than training images. A group in several splits goes to the one that has most of
    its images.

    Args:
        examined: What is known of the images.
        splits: The split of each image of the scan.

    Returns:
        A row for every image, sorted by path.
    """
    images = examined.scan.images
    home = _homes(examined, splits)
    reasons: dict[int, str] = {}
    for rows in examined.copies.same_pixels:
        if len({images[row].label for row in rows}) > 1:
            reasons.update(dict.fromkeys(rows, "the same picture has several labels"))
            continue
        kept = min(rows, key=lambda row: (_WORTH.get(home[row], 3), images[row].path))
        reasons.update({row: f"the same picture as {images[kept].path}" for row in rows if row != kept})
    for pair in examined.copies.near:
        rows = [row for row in (pair.first, pair.second) if row not in reasons]
        if len(rows) == 2 and home[rows[0]] != home[rows[1]]:
            kept, left = sorted(rows, key=lambda row: (_WORTH.get(home[row], 3), images[row].path))
            reasons[left] = f"nearly the same picture as {images[kept].path}"
    listed = [
        SplitRow(
            image.path,
            DROP if row in reasons else home[row],
            image.label,
            reasons.get(row, "" if home[row] == splits[row] else f"moved from {splits[row]}, with its group"),
        )
        for row, image in enumerate(images)
    ]
    listed += [
        SplitRow(image.path, DROP, "", f"it {image.reason}") for found in examined.scan.bad.values() for image in found
    ]
    return sorted(listed, key=lambda row: row.path)


def _homes(examined: Examined, splits: Sequence[str]) -> list[str]:
    """Gives the images of a group one split."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for image, split in zip(examined.scan.images, splits, strict=True):
        if image.group is not None:
            counts[image.group][split] += 1
    most = {
        group: max(found, key=lambda split: (found[split], _WORTH.get(split, 3))) for group, found in counts.items()
    }
    return [
        split if image.group is None else most[image.group]
        for image, split in zip(examined.scan.images, splits, strict=True)
    ]
