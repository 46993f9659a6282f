"""How much of the label can be told without looking at the picture: from its file alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier

from torchthaw.data.audit.scan import ImageFacts

_FOLDS = 5
# More images make the figures hardly more exact.
_MOST_IMAGES = 20_000
_FEWEST_OF_A_CLASS = 8
_MOST_VALUES = 60
# Standard errors by which chance must be exceeded.
_SURE = 3.0
# Share of the way from chance to perfection. Length and size of a file also depend on what is in the picture.
_NOTEWORTHY, _NOTEWORTHY_BY_CONTENT = 0.2, 0.5
_STRONG = 0.7
# The same for one class against the rest, which hardly shows in the balanced accuracy of many classes.
_EXPOSED, _EXPOSED_BY_CONTENT = 0.5, 0.8
_STRONGLY_EXPOSED = 0.9
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"\d+")
_KINDS_BY_CONTENT = frozenset({"file length", "bytes per pixel"})
PROPERTIES_OF_NAMES = frozenset({"words in the path", "number in the file name", "folder depth"})


@dataclass(frozen=True)
class LabelLeak:
    """A property of files that predicts the label.

    Attributes:
        name: What it is, such as `format` or `aspect ratio`.
        balanced_accuracy: Of a decision tree that sees nothing else, cross-validated over five folds.
        chance: What guessing gives.
        standard_error: Of the balanced accuracy.
        gives_away: Its values that say most, such as "PNG: 98 % cat (of 120)".
        exposed: The class that is told best from the rest.
        exposure: How often the tree names this class where it is right, less how often where it is wrong: 1 if it is
            always known, 0 by chance.
        exposure_error: Standard error of that.
    """

    name: str
    balanced_accuracy: float
    chance: float
    standard_error: float
    gives_away: tuple[str, ...]
    exposed: str
    exposure: float
    exposure_error: float

    @property
    def share(self) -> float:
        """How far it gets from chance (0) to perfection (1)."""
        return (self.balanced_accuracy - self.chance) / (1 - self.chance)

    @property
    def strong(self) -> bool:
        """Whether a model could do most of its work without the picture."""
        return self.share >= _STRONG or self.exposure >= _STRONGLY_EXPOSED

    @property
    def noteworthy(self) -> bool:
        """Whether it is beyond chance, and more than pictures differ of themselves."""
        by_content = self.name in _KINDS_BY_CONTENT
        overall = self.share >= (_NOTEWORTHY_BY_CONTENT if by_content else _NOTEWORTHY)
        exposed = self.exposure >= (_EXPOSED_BY_CONTENT if by_content else _EXPOSED)
        return (overall and self.balanced_accuracy - self.chance >= _SURE * self.standard_error) or (
            exposed and self.exposure >= _SURE * self.exposure_error
        )


def find_label_leaks(images: Sequence[ImageFacts], *, seed: int = 0) -> list[LabelLeak]:
    """Finds properties of files that predict the label well beyond chance, the strongest first.

    Each property alone is given to a decision tree (scikit-learn, at most 32 leaves, classes balanced), and judged by
    its balanced accuracy in five-fold cross-validation. It is reported when that exceeds chance by three standard
    errors and goes at least 20 % of the way from chance to perfection, or when one class is told from the rest for
    50 % of the way; 50 % and 80 % for what also depends on the content of pictures, the length of the file and its
    bytes per pixel. Classes with fewer than 8 images are left out.

    Args:
        images: All images.
        seed: Of the folds, and of the choice of 20,000 images where there are more.
    """
    counts = Counter(image.label for image in images)
    usable = [image for image in images if counts[image.label] >= _FEWEST_OF_A_CLASS]
    if len(usable) > _MOST_IMAGES:
        chosen = np.random.default_rng(seed).choice(len(usable), _MOST_IMAGES, replace=False)
        usable = [usable[row] for row in sorted(chosen)]
        counts = Counter(image.label for image in usable)
        usable = [image for image in usable if counts[image.label] >= _FEWEST_OF_A_CLASS]
    if len({image.label for image in usable}) < 2:
        return []
    labels = np.array([image.label for image in usable])
    judged = [_judge(name, values, labels, seed) for name, values in _properties(usable).items()]
    leaks = [leak for leak in judged if leak is not None and leak.noteworthy]
    # Of equals, those stay first that are named first: a format says more than what comes with it.
    return sorted(leaks, key=lambda leak: -leak.balanced_accuracy)


_Values = list[str] | npt.NDArray[np.float64]


def _properties(images: Sequence[ImageFacts]) -> dict[str, _Values]:
    """Returns the properties that are not the same in all images: numbers, or texts."""
    texts: dict[str, Callable[[ImageFacts], object]] = {
        "format": lambda image: image.format,
        "mode": lambda image: image.mode,
        "size": lambda image: f"{image.width} x {image.height}",
        "JPEG quality": lambda image: image.quality,
        "resolution": lambda image: image.resolution,
        "file extension": lambda image: PurePosixPath(image.path).suffix,
    }
    numbers: dict[str, Callable[[ImageFacts], float]] = {
        "width": lambda image: image.width,
        "height": lambda image: image.height,
        "aspect ratio": lambda image: image.width / image.height,
        "file length": lambda image: image.num_bytes,
        "bytes per pixel": lambda image: image.num_bytes / (image.width * image.height),
        "folder depth": lambda image: len(_folders(image)),
        "number in the file name": lambda image: _number(PurePosixPath(image.path).stem),
    }
    for field in sorted({name for image in images for name in image.exif}):
        texts[f"EXIF {field}"] = partial(_exif, field)
    found: dict[str, _Values] = {name: [str(read(image)) for image in images] for name, read in texts.items()}
    found |= {name: np.array([read(image) for image in images], np.float64) for name, read in numbers.items()}
    found["words in the path"] = [_words(image) for image in images]
    return {name: values for name, values in found.items() if len(set(map(str, values))) > 1}


def _exif(field: str, image: ImageFacts) -> str:
    value = image.exif.get(field, "missing")
    # Of a moment, the day tells whether classes were photographed apart.
    return value[:10] if field.startswith("DateTime") else value


def _folders(image: ImageFacts) -> tuple[str, ...]:
    return PurePosixPath(image.path).parts[:-1]


def _number(name: str) -> float:
    found = _NUMBER.findall(name)
    # Longer ones are identifiers, which floats would round.
    return float(found[-1]) if found and len(found[-1]) < 15 else -1.0


def _words(image: ImageFacts) -> str:
    """Returns the words of a path besides those that are the class's name, and the folder of the class."""
    own = {word.lower() for word in _WORD.findall(image.label)} | {image.label.lower()}
    parts = [part for part in _folders(image) if part.lower() != image.label.lower() and part.lower() != image.split]
    words = [word.lower() for part in (*parts, PurePosixPath(image.path).stem) for word in _WORD.findall(part)]
    return " ".join(sorted({word for word in words if word not in own and word.rstrip("s") not in own}))


def _judge(name: str, values: _Values, labels: npt.NDArray, seed: int) -> LabelLeak | None:
    if isinstance(values, list):
        column = _columns(name, values)
        if column is None:
            return None
    else:
        column = values[:, None]
    tree = DecisionTreeClassifier(max_leaf_nodes=32, min_samples_leaf=3, class_weight="balanced", random_state=seed)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(tree, column, labels, cv=folds)
    classes = np.unique(labels).tolist()
    named = {label: _share(predicted[labels == label] == label) for label in classes}
    mistaken = {label: _share(predicted[labels != label] == label) for label in classes}
    exposed = max(classes, key=lambda label: named[label][0] - mistaken[label][0])
    return LabelLeak(
        name,
        balanced_accuracy=float(np.mean([recall for recall, _ in named.values()])),
        chance=1 / len(classes),
        standard_error=math.sqrt(sum(variance for _, variance in named.values())) / len(classes),
        gives_away=_telling(values, labels),
        exposed=exposed,
        exposure=named[exposed][0] - mistaken[exposed][0],
        exposure_error=math.sqrt(named[exposed][1] + mistaken[exposed][1]),
    )


def _share(hits: npt.NDArray) -> tuple[float, float]:
    """Returns the share of hits and the variance of its estimate."""
    size = len(hits)
    # With Laplace's correction, so that a share of 1 is not certain.
    smoothed = (float(hits.sum()) + 1) / (size + 2)
    return float(hits.mean()), smoothed * (1 - smoothed) / size


def _columns(name: str, values: list[str]) -> npt.NDArray[np.float64] | None:
    """Returns one column for each frequent value, or for each frequent word of texts that are lists of words."""
    if name == "words in the path":
        texts = [set(value.split()) for value in values]
        counts = Counter(word for text in texts for word in text)
        common = [word for word, count in counts.most_common(_MOST_VALUES) if 3 <= count < len(values)]
        return np.array([[word in text for word in common] for text in texts], np.float64) if common else None
    encoder = OneHotEncoder(max_categories=_MOST_VALUES, sparse_output=False)
    return np.asarray(encoder.fit_transform(np.array(values, dtype=object)[:, None]), np.float64)


def _telling(values: _Values, labels: npt.NDArray) -> tuple[str, ...]:
    """Says which values go with which class: the most frequent texts, or for numbers the medians of the classes."""
    if not isinstance(values, list):
        medians = {label: float(np.median(values[labels == label])) for label in np.unique(labels)}
        return tuple(
            f"{label}: median {value:.4g}" for label, value in sorted(medians.items(), key=lambda item: item[1])
        )
    pairs = Counter(zip(values, labels.tolist(), strict=True))
    totals = Counter(values)
    best = sorted(pairs.items(), key=lambda item: -item[1] * (item[1] / totals[item[0][0]]))[:4]
    return tuple(
        f"{value or 'none'}: {count / totals[value]:.0%} {label} (of {totals[value]})" for (value, label), count in best
    )
