"""What a run does about uneven classes: settings, their checks, a proposal by the counts. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from torchthaw.data.class_balance import class_counts, count_weights, imbalance_ratio
from torchthaw.errors import PlanError, did_you_mean

CHOICES = ("auto", "off")
CLASS_WEIGHTS = ("balanced", "sqrt")
SAMPLING = ("balanced", "sqrt")
LOSSES = ("cross_entropy", "focal", "logit_adjusted")
# Times that the largest class has the images of the smallest one. From here on macro F1 chooses the best weights ...
IMBALANCE_FOR_MACRO_F1 = 2.0
# ... and here on a run proposes to train against it, or with `auto` does so.
IMBALANCE_TO_ACT = 10.0


@dataclass(frozen=True)
class ImbalanceSettings:
    """What was asked for; the fields are those of `ThawTrainingArguments` of the same names."""

    imbalance: str | None = None
    class_weights: str | Mapping[Any, float] | None = None
    sampling: str | None = None
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    logit_adjustment: float = 1.0

    @classmethod
    def of(cls, source: Any) -> "ImbalanceSettings":
        """Takes them from arguments or a recipe."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})

    def by_counts(self) -> list[str]:
        """Returns the settings, as lines of a recipe, that make up for the classes' numbers of images."""
        lines = []
        if isinstance(self.class_weights, str):
            lines.append(f"class_weights: {self.class_weights}")
        if self.sampling is not None:
            lines.append(f"sampling: {self.sampling}")
        if self.loss == "logit_adjusted":
            lines.append("loss: logit_adjusted")
        return lines

    def lines(self) -> list[str]:
        """Returns all that differs from plain training, as lines of a recipe."""
        named = {"class_weights": self.class_weights, "sampling": self.sampling}
        lines = [f"{key}: {_shown(value)}" for key, value in named.items() if value is not None]
        if self.loss != "cross_entropy":
            lines.append(f"loss: {self.loss}")
        own = {"focal_gamma": self.focal_gamma, "logit_adjustment": self.logit_adjustment}
        default = ImbalanceSettings()
        return lines + [f"{key}: {value:g}" for key, value in own.items() if value != getattr(default, key)]

    def check(self) -> None:
        """Checks what can be checked without data.

        Raises:
            PlanError: a value is unknown or out of range, or two settings contradict each other.
        """
        _check_choice("imbalance", self.imbalance, CHOICES)
        _check_choice("sampling", self.sampling, SAMPLING)
        _check_choice("loss", self.loss, LOSSES, optional=False)
        if isinstance(self.class_weights, Mapping):
            _check_weights(self.class_weights)
        else:
            _check_choice("class_weights", self.class_weights, CLASS_WEIGHTS, more=", or a weight for each class name")
        if not (_is_number(self.focal_gamma) and self.focal_gamma >= 0):
            raise PlanError(f"focal_gamma is {self.focal_gamma!r}; write 0 or a positive number such as 2")
        if not (_is_number(self.logit_adjustment) and self.logit_adjustment > 0):
            raise PlanError(f"logit_adjustment is {self.logit_adjustment!r}; write a positive number such as 1")
        for key, loss in (("focal_gamma", "focal"), ("logit_adjustment", "logit_adjusted")):
            if getattr(self, key) != getattr(ImbalanceSettings(), key) and self.loss != loss:
                raise PlanError(
                    f"{key} is {getattr(self, key)}, but loss is {self.loss!r}, which has none; write loss: {loss}, or "
                    f"leave {key} out"
                )
        if self.imbalance == "auto" and self.lines():
            raise PlanError(
                f"imbalance is 'auto', which chooses by the counts of the classes, but {', '.join(self.lines())} "
                "was given too; keep one of them"
            )
        twice = self.by_counts()
        if len(twice) > 1:
            raise PlanError(
                f"{' and '.join(twice)} each make up for the numbers of images, so that together they would do so "
                "twice and favour rare classes; keep one of them"
            )


def propose(counts: npt.NDArray[np.int64]) -> ImbalanceSettings:
    """Returns what `imbalance: auto` does, a pure function of the training images' counts.

    From `IMBALANCE_TO_ACT` on that is the logit adjusted loss, which trains for balanced accuracy (Menon et al.,
    "Long-tail Learning via Logit Adjustment", ICLR 2021). Its effect does not fade, as that of weights does, the longer
    a network is trained that can fit its images (Byrd and Lipton, "What is the Effect of Importance Weighting in Deep
    Learning?", ICML 2019). For less uneven classes the gain in macro F1 was within noise; see
    `tests/benchmarks/class_imbalance.py`.

    Args:
        counts: Images of each class, shape (K,).
    """
    if imbalance_ratio(counts) < IMBALANCE_TO_ACT:
        return ImbalanceSettings()
    if not counts.all():
        # No images have no logarithm.
        return ImbalanceSettings(class_weights="sqrt")
    return ImbalanceSettings(loss="logit_adjusted")


@dataclass(frozen=True)
class Balance:
    """What a run does about uneven classes, settled for its training images.

    Attributes:
        settings: What is done; of `auto`, what it proposed.
        requested: The recipe's `imbalance`: None, `auto` or `off`.
        counts: Training images by class name; None where they are not known.
        weights: Weight of each class in the loss, by name; None for all 1.
    """

    settings: ImbalanceSettings
    requested: str | None
    counts: dict[str, int] | None
    weights: dict[str, float] | None

    @property
    def ratio(self) -> float | None:
        """How many times the images of the smallest class the largest one has."""
        return None if self.counts is None else imbalance_ratio(self._numbers())

    def log_priors(self) -> list[float]:
        """Returns the logarithm of each class's share of the training images."""
        assert self.counts is not None
        total = sum(self.counts.values())
        return [math.log(count / total) for count in self.counts.values()]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data, for `results.json`."""
        settings = self.settings
        return {
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "requested": self.requested,
            "class_weights": settings.class_weights if isinstance(settings.class_weights, str | None) else "given",
            "weights": None if self.weights is None else {name: round(w, 6) for name, w in self.weights.items()},
            "sampling": settings.sampling,
            "loss": settings.loss,
            "focal_gamma": settings.focal_gamma if settings.loss == "focal" else None,
            "logit_adjustment": settings.logit_adjustment if settings.loss == "logit_adjusted" else None,
        }

    def sentences(self, metric: str) -> list[str]:
        """Returns what a run says of it, one line at most: none where classes are even and nothing was asked for.

        Args:
            metric: What chooses the best weights.
        """
        done = ", ".join(self.settings.lines())
        if self.requested == "off" or self.counts is None:
            return [f"Against imbalance: {done}."] if done else []
        parts = []
        if imbalance_ratio(self._numbers()) >= IMBALANCE_FOR_MACRO_F1:
            chosen_by = "macro F1, to which every class counts the same," if metric == "macro_f1" else metric
            parts.append(f"Classes are uneven: {self._range()}; {chosen_by} chooses the best weights.")
        if done:
            parts.append(f"Against imbalance: {done}{' (imbalance: auto)' if self.requested == 'auto' else ''}.")
        elif self.requested == "auto":
            parts.append(f"Below a ratio of {IMBALANCE_TO_ACT:g}, imbalance: auto trains plainly.")
        elif proposed := ", ".join(propose(self._numbers()).lines()):
            parts.append(f"To train against it, write {proposed} (imbalance: auto does; imbalance: off hides this).")
        return [" ".join(parts)] if parts else []

    def _numbers(self) -> npt.NDArray[np.int64]:
        return np.asarray(list((self.counts or {}).values()))

    def _range(self) -> str:
        assert self.counts is not None
        smallest, largest = min(self.counts, key=self.counts.__getitem__), max(self.counts, key=self.counts.__getitem__)
        return (
            f"{self.counts[largest]} training images of {largest}, {self.counts[smallest]} of {smallest} "
            f"(ratio {self.ratio:.1f})"
        )


def settle(
    settings: ImbalanceSettings, *, labels: npt.ArrayLike | None, class_names: Sequence[str], several_labels: bool
) -> Balance:
    """Settles what was asked for on the training images.

    Args:
        settings: What was asked for.
        labels: Class id of each training image; None where that is not known, as of a stream.
        class_names: Names in the order of the ids.
        several_labels: Whether an image may have several labels.

    Raises:
        PlanError: it needs counts that are not known, or names a class that does not exist.
    """
    settings.check()
    counts = None if labels is None or several_labels else class_counts(labels, len(class_names))
    requested = settings.imbalance
    for line in ["imbalance: auto"] if requested == "auto" else settings.by_counts():
        _check_countable(line, counts, several_labels=several_labels)
    if requested == "auto":
        assert counts is not None
        settings = propose(counts)
    if settings.loss == "logit_adjusted" and counts is not None and not counts.all():
        empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
        raise PlanError(
            f"loss: logit_adjusted takes the logarithm of each class's share of the training images, but there are "
            f"none of {', '.join(map(repr, empty))}; add some, or write class_weights: balanced"
        )
    return Balance(
        replace(settings, imbalance=None),
        requested,
        None if counts is None else dict(zip(class_names, counts.tolist(), strict=True)),
        _weights(settings.class_weights, counts, class_names),
    )


def _weights(
    wanted: str | Mapping[Any, float] | None, counts: npt.NDArray[np.int64] | None, class_names: Sequence[str]
) -> dict[str, float] | None:
    if wanted is None:
        return None
    if isinstance(wanted, str):
        assert counts is not None
        return dict(zip(class_names, count_weights(counts, wanted).tolist(), strict=True))
    # In YAML the name of a class may look like a number.
    given = {str(name): float(weight) for name, weight in wanted.items()}
    for name in given:
        if name not in class_names:
            raise PlanError(
                f"class_weights names the class {name!r}, which does not exist.{did_you_mean(name, class_names)} "
                f"There are {', '.join(class_names[:20])}{' ...' if len(class_names) > 20 else ''}."
            )
    return {name: given.get(name, 1.0) for name in class_names}


def _check_countable(line: str, counts: npt.NDArray[np.int64] | None, *, several_labels: bool) -> None:
    if several_labels:
        raise PlanError(
            f"{line} goes by the one class of each image, but the model's images may have several labels; write "
            "class_weights with a weight for each class name, or loss: focal"
        )
    if counts is None:
        raise PlanError(
            f"{line} goes by the number of training images of each class, which is not known of a stream; write "
            "class_weights with a weight for each class name, or load the images without streaming"
        )


def _check_choice(key: str, value: Any, choices: Sequence[str], *, optional: bool = True, more: str = "") -> None:
    if value in choices or (value is None and optional):
        return
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise PlanError(f"unknown {key} {value!r}.{hint} There are {', '.join(choices)}{more}.")


def _check_weights(weights: Mapping[Any, float]) -> None:
    if not weights:
        raise PlanError("class_weights is an empty mapping; write a weight for each class name, or balanced or sqrt")
    for name, weight in weights.items():
        if not (_is_number(weight) and weight > 0):
            raise PlanError(f"class_weights gives {name!r} the weight {weight!r}; write a positive number such as 2")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "{" + ", ".join(f"{k}: {w:g}" for k, w in value.items()) + "}"
