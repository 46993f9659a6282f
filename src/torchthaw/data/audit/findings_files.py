"""Findings about single images and about classes."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from torchthaw.data.audit.label_leakage import PROPERTIES_OF_NAMES, LabelLeak
from torchthaw.data.audit.near_duplicates import LEAST_CONTRAST
from torchthaw.data.audit.report import Finding
from torchthaw.data.audit.scan import ImageFacts
from torchthaw.data.audit.suspicious_labels import SuspiciousLabel
from torchthaw.data.bad_images import BadImage

_SMALLEST_SIDE = 16
_TIMES_THE_MEDIAN = 16
_LARGEST_RATIO = 5.0
_ORDINARY_MODES = frozenset({"RGB", "L"})
_STRONG_IMBALANCE = 10.0
_IMBALANCE = 2.0


def unreadable(bad: Mapping[str, Sequence[BadImage]], *, dropped: bool) -> Iterator[Finding]:
    """Images that cannot be decoded."""
    images = [{"path": image.path, "split": split, "reason": image.reason} for split in bad for image in bad[split]]
    if images:
        yield Finding(
            "unreadable images",
            "warn" if dropped else "fail",
            len(images),
            f"{_images(len(images))} that cannot be decoded" + (", left out" if dropped else ""),
            "Mend or remove them." + ("" if dropped else " Or leave them out: data: {on_bad_image: drop}"),
            tuple(images),
        )


def unusual_images(images: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Images that decode, but are nearly uniform, or far from the others in size, shape or mode."""
    if not images:
        return
    uniform = [_about(image, contrast=round(image.contrast, 2)) for image in images if image.contrast < LEAST_CONTRAST]
    if uniform:
        yield Finding(
            "nearly uniform images",
            "warn",
            len(uniform),
            f"{_images(len(uniform))} showing hardly anything (grey levels vary less than {LEAST_CONTRAST:g} of 255)",
            "Look at them; placeholders and blank pages teach a model nothing.",
            tuple(uniform),
        )
    median = float(np.median([image.width * image.height for image in images]))
    sizes = [
        _about(image, size=f"{image.width} x {image.height}")
        for image in images
        if min(image.width, image.height) < min(_SMALLEST_SIDE, median**0.5)
        or not 1 / _TIMES_THE_MEDIAN <= image.width * image.height / median <= _TIMES_THE_MEDIAN
    ]
    if sizes:
        yield Finding(
            "extreme sizes",
            "warn",
            len(sizes),
            f"{_images(len(sizes))} with over {_TIMES_THE_MEDIAN} times the pixels of the median image, or under a "
            f"{_TIMES_THE_MEDIAN}th, or a side below {_SMALLEST_SIDE}",
            "Look at them: thumbnails, icons and scans of whole pages often got in by accident.",
            tuple(sizes),
        )
    shapes = [
        _about(image, size=f"{image.width} x {image.height}")
        for image in images
        if max(image.width, image.height) > _LARGEST_RATIO * min(image.width, image.height)
    ]
    if shapes:
        yield Finding(
            "extreme shapes",
            "warn",
            len(shapes),
            f"{_images(len(shapes))} over {_LARGEST_RATIO:g} times as long as wide; a centre crop shows little of them",
            "Cut them to what matters.",
            tuple(shapes),
        )
    modes = Counter(image.mode for image in images if image.mode not in _ORDINARY_MODES)
    if modes:
        kinds = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        yield Finding(
            "unusual modes",
            "pass",
            sum(modes.values()),
            f"images in other modes than RGB and grey are converted: {kinds}",
            None,
            tuple(_about(image, mode=image.mode) for image in images if image.mode not in _ORDINARY_MODES),
        )


def class_counts(images: Sequence[ImageFacts], splits: Sequence[str], class_names: Sequence[str]) -> Iterator[Finding]:
    """Classes that a split lacks, and how unequal they are in training."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for image, split in zip(images, splits, strict=True):
        counts[split].update((image.label,) if image.classes is None else image.classes)
    lacking = [{"split": split, "class": name} for split in counts for name in class_names if counts[split][name] == 0]
    if lacking:
        in_training = sorted({item["class"] for item in lacking if item["split"] == "train"})
        yield Finding(
            "classes without images",
            "fail" if in_training else "warn",
            len(lacking),
            "; ".join(
                f"{split} has none of {', '.join(item['class'] for item in lacking if item['split'] == split)}"
                for split in dict.fromkeys(item["split"] for item in lacking)
            ),
            "Add images of them; figures say nothing about a class that is not in the split.",
            tuple(lacking),
        )
    train = {name: counts["train"][name] for name in class_names if counts["train"][name]}
    ratio = max(train.values()) / min(train.values()) if train else 1.0
    if ratio >= _IMBALANCE:
        most, least = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
        yield Finding(
            "class imbalance",
            "warn" if ratio >= _STRONG_IMBALANCE else "pass",
            len(train),
            f"the largest class of training, {most} ({train[most]}), has {ratio:.1f} times the images of the smallest, "
            f"{least} ({train[least]})",
            _against_imbalance(
                strong=ratio >= _STRONG_IMBALANCE, several=any(image.classes is not None for image in images)
            ),
            tuple({"class": name, "images": count} for name, count in train.items()),
        )


def _against_imbalance(*, strong: bool, several: bool) -> str:
    if several:
        more = " To give rare ones more weight in training, write class_weights: {NAME: WEIGHT}"
        return "mAP, to which every class counts the same, chooses the best weights (metric: auto)." + more * strong
    more = " To train for it, write imbalance: auto"
    return "Macro F1 chooses the best weights (metric: auto)." + more * strong


def label_leaks(leaks: Sequence[LabelLeak]) -> Iterator[Finding]:
    """Properties of files that predict the label."""
    by_file = [leak for leak in leaks if leak.name not in PROPERTIES_OF_NAMES]
    by_name = [leak for leak in leaks if leak.name in PROPERTIES_OF_NAMES]
    if by_file:
        yield Finding(
            "label leakage by the files",
            "fail" if any(leak.strong for leak in by_file) else "warn",
            len(by_file),
            f"the label can be told without looking at the picture, by {_shown(by_file)}",
            "Classes seem to come from different sources, and a model may learn the source. Collect every class from "
            "all sources, or save all images alike (one format, size and quality); and test on images of new sources.",
            tuple(map(_figures, by_file)),
        )
    if by_name:
        yield Finding(
            "label leakage by the names",
            "warn",
            len(by_name),
            f"the label can be told without looking at the picture, by {_shown(by_name)}",
            "A model sees no names, but names tell where images come from. If they name a unit of independence, split "
            "by it: data: {group: '(pattern)'}",
            tuple(map(_figures, by_name)),
        )


def suspicious_labels(suspects: Sequence[SuspiciousLabel], images: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Images that look like those of another class."""
    if suspects:
        first = suspects[0]
        yield Finding(
            "suspicious labels",
            "pass",
            len(suspects),
            f"{_images(len(suspects))} that resemble those of other classes only; first: {images[first.row].path} is "
            f"labelled {first.label} and looks like {first.suggested}",
            "Look at them, the first ones first; many are only hard.",
            tuple(
                _about(images[suspect.row], suggested=suspect.suggested, agreement=round(suspect.agreement, 3))
                for suspect in suspects
            ),
        )


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def _about(image: ImageFacts, **more: Any) -> dict[str, Any]:
    return {"path": image.path, "label": image.label, **more}


def _shown(leaks: Sequence[LabelLeak]) -> str:
    return "; ".join(
        f"{leak.name} ({leak.balanced_accuracy:.0%} balanced accuracy, chance {leak.chance:.0%}; {leak.gives_away[0]})"
        for leak in leaks[:3]
    )


def _figures(leak: LabelLeak) -> dict[str, Any]:
    return {
        "property": leak.name,
        "balanced_accuracy": round(leak.balanced_accuracy, 4),
        "chance": round(leak.chance, 4),
        "standard_error": round(leak.standard_error, 4),
        "exposed": leak.exposed,
        "exposure": round(leak.exposure, 4),
        "gives_away": list(leak.gives_away),
    }
