"""`audit_dataset`: what is wrong with a data set, before anything is trained on it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy.typing as npt
from datasets import Dataset, DatasetDict

from torchthaw.data.audit import findings_files, findings_splits
from torchthaw.data.audit.copies import Copies, find_copies
from torchthaw.data.audit.label_leakage import find_label_leaks
from torchthaw.data.audit.report import AuditReport, Finding, worst_first
from torchthaw.data.audit.scan import Scan, scan_images
from torchthaw.data.audit.suspicious_labels import find_suspicious_labels
from torchthaw.errors import DataError

Progress = Callable[[str, int, int], None]
_CHECKS = ("files", "exact duplicates", "near duplicates", "label leakage", "classes")


@dataclass
class Examined:
    """What is known of the images of a data set, whatever their splits.

    Attributes:
        scan: All images.
        copies: Which of them are the same.
        seconds: How long each step took.
    """

    scan: Scan
    copies: Copies
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def clusters(self) -> list[list[str]]:
        """Paths of the images that are copies of each other, exact or nearly."""
        return [[self.scan.images[row].path for row in rows] for rows in self.copies.clusters]


def audit_dataset(
    dataset: DatasetDict,
    *,
    features: npt.NDArray | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AuditReport:
    """Looks for what makes figures of a model too good, or training break.

    Every file is read and decoded once. Looked at are: files that cannot be decoded, or are odd; duplicates, exact (by
    bytes and by pixels) and near ones (resized, recompressed, brightened, grey, flipped, turned, cropped), within
    and across splits and labels; groups and times across splits; properties of files that predict the label; counts
    of classes; and with `features`, images that resemble those of other classes.

    Args:
        dataset: Splits with the columns `image`, `label` and `path`, and as far as known `group` and `time`, as
            `load_image_dataset` returns them.
        features: Features of a backbone for all images that can be decoded, split after split, shape (images,
            features).
        seed: Of the cross-validation.
        progress: Is told a step's name, how much of it is done, and of how much.

    Returns:
        The findings; `verdict` is the worst of them.

    Raises:
        DataError: There are no images that can be decoded, or a split is a stream.
    """
    examined = examine_dataset(dataset, progress=progress)
    splits = [image.split for image in examined.scan.images]
    return judge(examined, splits, features=features, seed=seed)


def examine_dataset(dataset: Mapping[str, Dataset], *, progress: Progress | None = None) -> Examined:
    """Looks at every image once, and finds copies among all of them.

    Raises:
        DataError: There are no images that can be decoded, or a split is a stream.
    """
    streams = [split for split, rows in dataset.items() if not isinstance(rows, Dataset)]
    if streams:
        raise DataError(
            f"The audit compares all images with each other, which streams do not allow ({', '.join(streams)}). Load "
            "the data set without streaming."
        )
    seconds: dict[str, float] = {}
    with _timed(seconds, "reading and decoding"):
        scan = scan_images(dataset, progress=_named(progress, "Looking at the images"))
    if not scan.images:
        listed = [f"{image.path!r}: {image.reason}" for found in scan.bad.values() for image in found][:20]
        raise DataError("No image can be decoded:\n  " + "\n  ".join(listed))
    with _timed(seconds, "duplicates"):
        copies = find_copies(scan, progress=_named(progress, "Looking for copies"))
    return Examined(scan, copies, seconds)


def judge(
    examined: Examined,
    splits: Sequence[str],
    *,
    features: npt.NDArray | None = None,
    dropped: bool = False,
    seed: int = 0,
    not_checked: Mapping[str, str] | None = None,
) -> AuditReport:
    """Says what is wrong with a data set that has been looked at, given how it is split.

    Args:
        examined: What is known of the images.
        splits: The split of each image of the scan.
        features: See `audit_dataset`.
        dropped: Whether images that cannot be decoded are left out, rather than an error.
        seed: Of the cross-validation.
        not_checked: What was left out on purpose, and why.
    """
    scan, copies = examined.scan, examined.copies
    seconds = dict(examined.seconds)
    findings: list[Finding] = [*findings_files.unreadable(scan.bad, dropped=dropped)]
    checks, missing = list(_CHECKS), dict(not_checked or {})
    findings += findings_splits.exact_copies(scan.images, splits, copies)
    findings += findings_splits.near_copies(scan.images, splits, copies)
    if copies.not_compared:
        missing["near duplicates of some images"] = (
            f"{copies.not_compared} are too small or too uniform to be recognised when they are changed"
        )
    if any(image.group is not None for image in scan.images):
        findings += findings_splits.groups_across(scan.images, splits)
        checks.append("groups")
    else:
        missing["groups"] = "none are known; say what belongs together with data: {group: ...}"
    if any(image.time is not None for image in scan.images):
        findings += findings_splits.time_order(scan.images, splits)
        checks.append("time")
    else:
        missing["time"] = "it is not known; say where it is with data: {time: ...}"
    if any(image.classes is not None for image in scan.images):
        checks.remove("label leakage")
        missing["label leakage"] = "what properties of files say of several labels per image is not looked at"
        missing["suspicious labels"] = "for several labels per image they are not looked for"
        features = None
    else:
        with _timed(seconds, "label leakage"):
            findings += findings_files.label_leaks(find_label_leaks(scan.images, seed=seed))
    findings += findings_files.class_counts(scan.images, splits, scan.class_names)
    findings += findings_files.unusual_images(scan.images)
    if features is not None:
        with _timed(seconds, "suspicious labels"):
            suspects = find_suspicious_labels(features, [image.label for image in scan.images])
        findings += findings_files.suspicious_labels(suspects, scan.images)
        checks.append("suspicious labels")
    else:
        missing.setdefault("suspicious labels", "that takes a backbone's features")
    order = ("train", "validation", "test")
    counts = Counter(splits)
    sizes = {split: counts[split] for split in (*order, *sorted(set(counts) - set(order))) if counts[split]}
    return AuditReport(
        worst_first(findings), sizes, tuple(checks), missing, seconds, tuple(map(tuple, examined.clusters))
    )


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


def _named(progress: Progress | None, step: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(step, done, total)
